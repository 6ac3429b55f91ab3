// What is near a picture, and what it votes for.

import { ApiError, callJson, ofGallery, posting } from "./api.js";
import { $, el, percent, plural, timeOf } from "./elements.js";
import { titleOf } from "./messages.js";
import { app } from "./state.js";
import { tile } from "./thumbnails.js";

const NEIGHBORS = 12;

/** Neighbors as the gallery's own encoder sees them; an error here is no reason to withhold the attention. */
export async function neighborsOf({ id }, bytes) {
  if (!app.gallery.count) return { neighbors: [] };
  const query = { k: NEIGHBORS, vote: true };
  if ($("only-label").value) query.label = $("only-label").value;
  if (!app.gallery.encoder) query.encoder = app.encoder.name;
  try {
    if (id) return await callJson(ofGallery("neighbors", { id, ...query }));
    return await callJson(ofGallery("neighbors", query), posting(bytes));
  } catch (error) {
    if (error instanceof ApiError) return { neighbors: [], error };
    throw error;
  }
}

/** The labels to choose neighbors from. */
export function showLabels(labels) {
  const chosen = $("only-label").value;
  const options = labels.sort().map((value) => el("option", { value, textContent: value }));
  $("only-label").replaceChildren(el("option", { value: "", textContent: "any label" }), ...options);
  $("only-label").value = labels.includes(chosen) ? chosen : "";
  $("only-label").parentElement.hidden = !labels.length;
}

export function showNeighbors({ neighbors, vote, error, took }, image) {
  const agrees = ({ label }) => Boolean(label) && label === vote?.label;
  $("neighbors").replaceChildren(...neighbors.map((neighbor) => tile(neighbor, { agrees: agrees(neighbor) })));
  $("vote").hidden = !neighbors.length || Boolean($("only-label").value); // all of one label have nothing to vote on
  if (!$("vote").hidden) showVote(vote, image, neighbors.length);
  const other = app.gallery.encoder && app.gallery.encoder.name !== app.encoder.name;
  $("neighbors-note").textContent = error
    ? `${titleOf(error)} ${error.message}`
    : !neighbors.length
      ? app.gallery.count
        ? `There is no other picture in the gallery${$("only-label").value ? " with that label" : ""}.`
        : "The gallery is empty: nothing can be near. Add this picture, and the next one has a neighbor."
      : `The nearest of ${plural(app.gallery.count, "picture")}, by cosine similarity${other ? `, as ${app.gallery.encoder.name} sees them` : ""}. Click one to go on from there.`;
  $("neighbors-time").textContent = took ? timeOf(took) : "";
}

function showVote(vote, image, count) {
  const [text, bar] = $("vote").children;
  bar.hidden = !vote.label;
  if (!vote.label) {
    text.textContent = "None of them has a label, so there is no vote.";
    return;
  }
  const known = image?.label ? (image.label === vote.label ? ", and so does its label" : `; its label says ${image.label}`) : "";
  const say = `The ${count} nearest say `;
  text.replaceChildren(say, el("b", { textContent: vote.label }), `, with ${percent(vote.confidence)} of the vote${known}.`);
  bar.firstElementChild.style.width = `${100 * vote.confidence}%`;
}
