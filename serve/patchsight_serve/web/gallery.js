// The gallery as a whole: its size, its labels, and a strip of pictures to start with.

import { callJson, galleryName, ofGallery, pause } from "./api.js";
import { $, el, plural } from "./elements.js";
import { offerAll } from "./filling.js";
import { showGalleries } from "./galleries.js";
import { showLabels } from "./neighbors.js";
import { app } from "./state.js";
import { ownOf } from "./target.js";
import { thumbnail } from "./thumbnails.js";
import { leaveTrail, markCurrent } from "./trail.js";

const SAMPLES = 10;
const OWN = 50; // of the person's own on the strip: whole photos, not thumbnails
const WATCH_MS = 1500;

let entered = { name: null, done: null };

/** Have the page be about the gallery that the address names. Of another one nothing is kept but the person's own pictures. */
export function enterGallery() {
  const name = galleryName();
  if (entered.name !== name) {
    const done = enter();
    entered = { name, done };
    done.catch(() => (entered.name = null)); // it is tried again
  }
  return entered.done;
}

async function enter() {
  app.shown = null;
  leaveTrail();
  for (const upload of app.uploads) upload.id = null; // they may be in another gallery, not in this one
  await readGallery();
  offerAll();
}

export async function readGallery() {
  app.galleries = (await callJson("galleries")).galleries;
  app.gallery = isThere() ? await callJson(ofGallery("gallery")) : { count: 0, encoder: null };
  app.images = app.gallery.count ? (await callJson(ofGallery("gallery/images", { limit: 1000 }))).images : [];
  const { count, encoder } = app.gallery;
  const by = encoder ? `, as ${encoder.name} sees them` : "";
  $("gallery-note").textContent = count ? `The gallery holds ${plural(count, "picture")}${by}.` : "The gallery is empty.";
  const labels = [...new Set(app.images.map((image) => image.label).filter(Boolean))];
  $("labels").replaceChildren(...labels.map((value) => el("option", { value })));
  showGalleries();
  showLabels(labels);
  showStrip();
}

/** The default gallery is always there; another one is made by its first picture. */
function isThere() {
  const name = galleryName();
  return name === "default" || app.galleries.some((gallery) => gallery.name === name);
}

/** At its first start the server indexes its sample photos: go along until the gallery no longer grows, with `grown` whenever it did. */
export async function watchGallery(grown) {
  for (let still = 0; still < (app.gallery.count ? 2 : 8); still++) {
    await pause(WATCH_MS);
    if (!isThere()) return;
    const before = app.gallery.count;
    const now = await callJson(ofGallery("gallery")).catch(() => app.gallery);
    if (now.count === before) continue;
    still = -1;
    await readGallery().catch(() => null);
    await grown();
  }
}

/** The person's own pictures, then one of the gallery of each label in turn. */
export function showStrip() {
  const byLabel = Map.groupBy ? [...Map.groupBy(app.images, (image) => image.label).values()] : [app.images];
  const samples = [];
  for (let i = 0; samples.length < Math.min(SAMPLES, app.images.length); i++) {
    samples.push(...byLabel.map((images) => images[i]).filter(Boolean));
  }
  const own = app.uploads.map(({ file, url, id }, n) => ({
    key: id ? `#/image/${id}` : `#/upload/${n}`,
    name: file.name,
    source: url,
  }));
  const rest = samples.filter(({ id }) => !ownOf(id)).slice(0, SAMPLES).map(({ id, label }) => ({ key: `#/image/${id}`, name: label ?? id, id }));
  const tiles = [...own.filter((tile) => tile.source).slice(0, OWN), ...rest].map(({ key, name, source, id }) => {
    const image = source ? el("img", { loading: "lazy", src: source, alt: name }) : thumbnail(id, name);
    const link = el("a", { href: key, title: name }, image);
    image.addEventListener("error", () => link.replaceChildren(el("span", { textContent: name })));
    return el("li", {}, link);
  });
  $("strip").replaceChildren(...tiles);
  $("strip-title").hidden = !tiles.length;
  $("strip-title").textContent = own.length ? "Yours, and some of the gallery" : "Or start with one of these";
  markCurrent();
}
