// What the gallery is made of: clusters, with their most typical pictures and their labels.

import { callJson, ofGallery } from "./api.js";
import { el, percent, plural } from "./elements.js";
import { part } from "./part.js";
import { app } from "./state.js";
import { tile } from "./thumbnails.js";

const TYPICAL = 8;
const MOST = 40;

export function clusters() {
  const max = Math.min(MOST, app.gallery.count);
  const usual = Math.round(Math.sqrt(app.gallery.count / 2)); // the server's own choice
  return part({
    title: "What the gallery is made of",
    about: "The pictures of a group are more like one another than like all others. The most typical ones come first.",
    name: "How many groups",
    input: { min: 1, max, value: Math.min(Math.max(usual, 2), max) },
    text: (k) => k,
    show,
  });
}

async function show(k) {
  const found = await callJson(ofGallery("gallery/clusters", { k, typical: TYPICAL }));
  return { note: [`${plural(found.images, "picture")} in ${plural(found.clusters.length, "group")}.`], items: found.clusters.map(item) };
}

function item({ size, labels, typical }) {
  const title = el("h3", { textContent: labels.length ? labels[0].label : "Without labels" });
  const shares = labels.map(({ label, count }) => `${label} ${percent(count / size)}`).join(" · ");
  const bar = el("div", { className: "shares", hidden: !labels.length }, ...labels.map(({ count }) => share(count / size)));
  bar.ariaHidden = "true";
  const about = el("p", { className: "note", textContent: [plural(size, "picture"), shares].filter(Boolean).join(" · ") });
  return el("li", {}, title, about, bar, el("ol", { className: "neighbors" }, ...typical.map((image) => tile(image))));
}

function share(part) {
  const piece = el("i");
  piece.style.width = `${100 * part}%`;
  return piece;
}
