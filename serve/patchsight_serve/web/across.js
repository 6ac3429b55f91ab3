// Across the gallery: the pictures that contain something like the chosen patches, and where.

import { callJson, ofGallery, posting } from "./api.js";
import { $, el, place, plural, timeOf } from "./elements.js";
import { titleOf } from "./messages.js";
import { squareOn } from "./picture.js";
import { gridOf } from "./similarity.js";
import { boxOf, inFrame } from "./square.js";
import { app } from "./state.js";
import { thumbnail, tile } from "./thumbnails.js";

const SHOWN = 12;
const FEW = 40; // pictures that are looked into at first: each costs an inference
const MANY = 200;

let search = null; // an AbortController

export function watchAcross() {
  $("across-find").addEventListener("click", () => look(FEW));
  $("across-more").addEventListener("click", () => look(MANY));
  $("across-back").addEventListener("click", () => {
    closeAcross();
    $("across-find").focus();
  });
}

/** What the whole picture is like is on view again; a search that is under way ends. */
export function closeAcross() {
  search?.abort();
  search = null;
  $("across").hidden = true;
  $("alike").hidden = false;
}

/** The button for it, or why there is none. */
export function offerAcross() {
  const why = obstacle();
  $("across-find").hidden = Boolean(why);
  $("across-obstacle").textContent = why ?? "";
}

function obstacle() {
  const { encoder } = app.gallery;
  const own = encoder && app.encoders.find(({ name }) => name === encoder.name);
  if (own && !gridOf(own)) return `The gallery is of ${own.name}, which has no patches: they cannot be looked for in it.`;
  if (!app.shown.bitmap) return "The browser cannot show this format, so its patches cannot be looked for in the gallery.";
  return app.gallery.count ? null : "The gallery is empty: there is nowhere to look for it.";
}

async function look(candidates) {
  closeAcross();
  const mine = (search = new AbortController());
  const others = app.gallery.count - (app.shown.target.id ? 1 : 0);
  working(Math.min(candidates, others));
  try {
    const found = await request(candidates, mine.signal);
    if (mine === search) show(found, candidates < others);
  } catch (error) {
    if (mine !== search) return;
    const why = error.code === "conflict" ? "A patch can only be looked for where the originals of pictures were kept:" : titleOf(error);
    $("across-note").textContent = `${why} ${error.message || "The server does not answer."}.`;
  } finally {
    if (mine === search) $("across-work").hidden = true;
  }
}

function working(count) {
  const { encoder } = app.gallery;
  const by = encoder && encoder.name !== app.encoder.name ? `, as ${encoder.name} sees them` : "";
  $("across").hidden = false;
  $("alike").hidden = true;
  $("across-work").hidden = false;
  $("across-more").hidden = true;
  $("across-found").replaceChildren();
  $("across-time").textContent = "";
  $("across-note").textContent = `Looking into ${plural(count, "picture")} patch by patch${by}. That takes some seconds.`;
  $("across-title").focus({ preventScroll: true });
  $("across").scrollIntoView({ block: "nearest" });
}

async function request(candidates, signal) {
  const { target, bytes, chosen, bitmap } = app.shown;
  const box = boxOf(chosen.block, chosen.grid, squareOn(bitmap)).map((edge) => edge.toFixed(6));
  const query = { box, k: SHOWN, candidates };
  if (target.id) return callJson(ofGallery("neighbors/region", { id: target.id, ...query }), { signal });
  return callJson(ofGallery("neighbors/region", query), { ...posting(bytes), signal });
}

function show({ neighbors, looked_at, without_original, unreadable, took }, more) {
  app.shown.across = neighbors; // the way leads on by them, too
  const of = "how like it the patches there are, at most 1";
  const tiles = neighbors.map((neighbor) => tile(neighbor, { of, picture: found(neighbor.id, neighbor.box) }));
  $("across-found").replaceChildren(...tiles);
  $("across-more").hidden = !more;
  const left = without_original + unreadable;
  const missing = left ? ` ${plural(left, "picture")} could not be looked into: ${without_original ? "no original was kept" : "they cannot be read"}.` : "";
  const where = `The frame is where. Looked into: the ${plural(looked_at, "picture")} nearest to this one and to what is around the patch.`;
  $("across-note").textContent = (neighbors.length ? where : "There is no other picture to look into.") + missing;
  $("across-time").textContent = timeOf(took);
  $("status").textContent = `${plural(neighbors.length, "picture")} with something like it.`;
}

/** A whole thumbnail in a square, with a frame around a box: left, top, right, bottom in fractions of the picture. */
function found(id, [left, top, right, bottom]) {
  const image = thumbnail(id, `Picture ${id}`);
  const frame = el("i", { className: "found-frame", hidden: true });
  image.addEventListener("load", () => {
    const box = { left, top, width: right - left, height: bottom - top };
    place(frame, inFrame(box, image.naturalWidth, image.naturalHeight));
    frame.hidden = false;
  });
  return el("span", { className: "found" }, image, frame);
}
