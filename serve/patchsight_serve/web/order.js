// The same pictures of the gallery, as one encoder or another puts them in order.

import { callJson } from "./api.js";
import { el } from "./elements.js";
import { dot } from "./similarity.js";
import { app } from "./state.js";
import { pictureOf } from "./target.js";
import { thumbnail } from "./thumbnails.js";

/**
 * Neighbors by their cosine to the picture in an encoder's eyes, best first, equal ones by id: [{id, label, score}].
 * embedding: of the picture, at length 1. found: what the gallery's own encoder found, which knows the scores already;
 * for another one the pictures are embedded anew, and those that it cannot read have a score of null and are last.
 */
export async function orderBy(encoder, embedding, { neighbors }) {
  if (!neighbors.length || encoder.name === app.gallery.encoder?.name) return neighbors;
  const form = new FormData();
  for (const picture of await Promise.all(neighbors.map(({ id }) => pictureOf(id)))) form.append("images", picture, "image");
  const query = new URLSearchParams({ encoder: encoder.name, priority: "interactive" });
  const { results } = await callJson(`embed?${query}`, { method: "POST", body: form });
  return neighbors
    .map(({ id, label }, i) => ({ id, label, score: results[i].error ? null : dot(embedding, results[i].embedding) }))
    .sort((a, b) => (b.score ?? -2) - (a.score ?? -2) || (a.id < b.id ? -1 : 1));
}

/** Tiles of a list. moves: how many places up each stands than in the other order; without, it is the one to compare with. */
export function tilesOf(order, moves = null) {
  return order.map(({ id, label, score }, place) => {
    const name = el("span", { className: "name", textContent: `${place + 1}. ${label ?? id}` });
    const value = el("span", { className: "score", textContent: score?.toFixed(3) ?? "–", title: "cosine similarity" });
    const picture = thumbnail(id, `Picture ${id}`);
    const move = moves ? [moveOf(moves[place])] : [];
    return el("li", {}, el("a", { href: `#/image/${id}`, title: id }, picture, name, value, ...move));
  });
}

function moveOf(places) {
  const text = places === 0 ? "stays" : `${places > 0 ? "↑" : "↓"} ${Math.abs(places)}`;
  const said = places === 0 ? "same place" : `${Math.abs(places)} places ${places > 0 ? "up" : "down"}`;
  return el("span", { className: places === 0 ? "move" : "move moved", textContent: text, title: said });
}
