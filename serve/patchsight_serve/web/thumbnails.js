// The gallery's thumbnails. They are fetched, and shown as object URLs, as an <img> could not send the API key.

import { call, galleryName, ofGallery } from "./api.js";
import { el } from "./elements.js";

const KEPT = 500; // at the same time

const thumbnails = new Map(); // path to a promise of an object URL

function thumbnailUrl(id, gallery) {
  const path = ofGallery(`gallery/images/${encodeURIComponent(id)}/thumbnail`, { gallery });
  if (!thumbnails.has(path)) {
    const url = call(path).then(async (reply) => URL.createObjectURL(await reply.blob()));
    url.catch(() => thumbnails.delete(path));
    thumbnails.set(path, url);
    if (thumbnails.size > KEPT) forget(thumbnails.keys().next().value);
  }
  return thumbnails.get(path);
}

function forget(path) {
  thumbnails.get(path).then(URL.revokeObjectURL, () => null); // what shows it already keeps it
  thumbnails.delete(path);
}

/** An <img> that gets its picture as soon as it is there. gallery: by default the one that the page is about. */
export function thumbnail(id, alt, gallery = galleryName()) {
  const image = el("img", { alt });
  thumbnailUrl(id, gallery).then((url) => (image.src = url), () => (image.alt = `${alt} (no picture)`));
  return image;
}

/** A picture that was found, as an item of a list: it leads to its own view. picture: to show, by default its thumbnail. */
export function tile({ id, label, score }, { agrees = false, of = "cosine similarity", picture = thumbnail(id, `Picture ${id}`) } = {}) {
  const name = el("span", { className: agrees ? "name agrees" : "name", textContent: label ?? id });
  const value = el("span", { className: "score", textContent: score.toFixed(3), title: of });
  return el("li", {}, el("a", { href: `#/image/${id}`, title: id }, picture, name, value));
}
