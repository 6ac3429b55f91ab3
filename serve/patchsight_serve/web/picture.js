// The picture with the encoder's attention on it, or with what is like a chosen patch; and the numbers it makes of it.

import { callJson, posting } from "./api.js";
import { compose, mean, paint, unpackHeads } from "./attention.js";
import { $, el, percent, timeOf } from "./elements.js";
import { gridOf } from "./similarity.js";
import { squareOf } from "./square.js";
import { app } from "./state.js";

export async function embed(bytes, encoder = app.encoder) {
  const wanted = "attention" in encoder.outputs ? "embedding,attention" : "embedding";
  const query = new URLSearchParams({ encoder: encoder.name, outputs: wanted });
  const reply = await callJson(`embed?${query}`, posting(bytes));
  const { embedding, attention } = reply.results[0];
  const heads = attention ? unpackHeads(attention) : [];
  return { embedding, maps: heads.length ? [mean(heads), ...heads] : [], took: reply.took };
}

export function showPicture({ embedding, maps, took }) {
  showHeads(maps);
  draw();
  $("summary-title").textContent = `Its summary: ${embedding.length} numbers`;
  paint($("summary"), { h: 1, w: embedding.length, values: embedding });
  $("embed-time").textContent = timeOf(took);
}

function showHeads(maps) {
  const chosen = Math.min(Math.max(chosenHead(), 0), Math.max(maps.length - 1, 0));
  const choices = headChoices("head", maps, chosen);
  const focused = document.activeElement?.name === "head";
  $("heads").replaceChildren(...choices);
  if (focused) choices[chosen]?.querySelector("input").focus();
}

/** Radio buttons of this name, each with a small map: the mean of all heads, and each head. */
export function headChoices(group, maps, chosen) {
  return maps.map((map, i) => {
    const name = i ? `Head ${i - 1}` : "Mean";
    const input = el("input", { type: "radio", name: group, value: i, checked: i === chosen });
    const small = el("canvas", { ariaHidden: "true" });
    paint(small, map);
    return el("label", {}, input, small, el("span", { textContent: name }));
  });
}

const chosenHead = () => Number(document.querySelector("input[name=head]:checked")?.value ?? 0);

/** What the encoder sees of a picture, as fractions of it. bitmap: null where the browser cannot read the picture. */
export function squareOn(bitmap, encoder = app.encoder) {
  return squareOf(bitmap?.width ?? 1, bitmap?.height ?? 1, encoder.manifest.transform);
}

/** The picture that is shown on a canvas, with a map over it as the person wants that drawn; without a map, alone. */
export function drawOn(canvas, map, encoder = app.encoder) {
  const { bitmap } = app.shown;
  const smooth = document.querySelector("input[name=drawn]:checked").value === "smooth";
  const layer = map ? document.createElement("canvas") : null;
  if (map) paint(layer, map, smooth);
  compose(canvas, bitmap, squareOn(bitmap, encoder), { layer, opacity: $("opacity").value / 100, smooth });
}

/** A map of `maps` in words. */
export const headName = (i) => (i ? `head ${i - 1}` : "the mean of all heads");

/** How many numbers an embedding has. manifest: of its encoder. */
export const lengthOf = ({ embedding_dim, recommended }) => embedding_dim * (recommended === "both" ? 2 : 1);

export function draw() {
  const { bitmap, maps, chosen } = app.shown;
  const map = chosen?.map ?? maps[chosenHead()];
  drawOn($("picture"), map);
  showWhat(chosen, map);
  if (bitmap && bitmap.width !== bitmap.height) $("attention-note").textContent += " The encoder sees the square in the middle.";
  if (!bitmap) $("attention-note").textContent += ` The browser cannot show this format${map ? ", so the map stands alone" : ""}.`;
  const name = $("picture-name").textContent;
  const what = chosen ? "what is like the chosen patch" : `the attention of ${headName(chosenHead())}`;
  $("picture").ariaLabel = map ? `${name} with ${what} on it` : name;
}

/** Say what is drawn, and show what belongs to it. */
function showWhat(chosen, map) {
  const patches = gridOf(app.encoder);
  const several = chosen && chosen.block.right - chosen.block.left + chosen.block.bottom - chosen.block.top > 2;
  const one = several ? "these patches" : "this patch";
  $("looks-title").textContent = chosen ? `What is like ${one}` : map ? "Where it looks" : "What it sees";
  $("looks-note").textContent = chosen
    ? `The brighter a patch, the more alike it and ${one} are to the encoder.`
    : (map ? "The brighter a patch, the more it weighs in the summary that the encoder makes of the picture. " : "") +
      (patches ? "Click a patch, or drag over several, to see what is like it." : "");
  $("controls").hidden = !map;
  $("heads").parentElement.hidden = Boolean(chosen);
  $("patch").hidden = !chosen;
  $("patch-back").textContent = app.shown.maps.length ? "Back to the attention" : "Back to the picture";
  $("patches").classList.toggle("chosen", Boolean(chosen));
  $("attention-note").textContent = chosen
    ? likenessNote(chosen)
    : map
      ? noteOf(map)
      : `This encoder has no attention to show${patches ? "" : ", and no patches to choose: it sees the picture as a whole"}.`;
}

/** chosen: a block of patches and the map of what is like it. */
function likenessNote({ block: { left, top, right, bottom }, map: { w, values } }) {
  const others = values.filter((_, i) => !(i % w >= left && i % w < right && i >= top * w && i < bottom * w));
  if (!others.length) return "All patches are chosen.";
  const [least, most] = [Math.min(...others), Math.max(...others)].map((value) => value.toFixed(2));
  return `The others' cosine similarity goes from ${least} to ${most}; the chosen one's to itself is 1.`;
}

function noteOf({ h, w, values }) {
  const strongest = values.reduce((a, b) => Math.max(a, b));
  const times = (strongest * h * w).toFixed(1);
  return `The brightest of ${h} × ${w} patches has ${percent(strongest, 1)} of the attention, ${times} times an even share.`;
}

$("opacity").addEventListener("input", draw);
$("controls").addEventListener("change", draw);
