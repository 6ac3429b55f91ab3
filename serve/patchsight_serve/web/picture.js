// The picture with the encoder's attention on it, and the numbers it makes of it.

import { callJson } from "./api.js";
import { compose, mean, paint, unpackHeads } from "./attention.js";
import { $, el, percent, timeOf } from "./elements.js";
import { app } from "./state.js";

export async function embed(bytes) {
  const wanted = "attention" in app.encoder.outputs ? "embedding,attention" : "embedding";
  const query = new URLSearchParams({ encoder: app.encoder.name, outputs: wanted });
  const reply = await callJson(`embed?${query}`, { method: "POST", body: bytes, type: "application/octet-stream" });
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
  $("controls").hidden = !maps.length;
  const chosen = Math.min(Math.max(chosenHead(), 0), Math.max(maps.length - 1, 0));
  const choices = maps.map((map, i) => {
    const name = i ? `Head ${i - 1}` : "Mean";
    const input = el("input", { type: "radio", name: "head", value: i, checked: i === chosen });
    const small = el("canvas", { ariaHidden: "true" });
    paint(small, map);
    return el("label", {}, input, small, el("span", { textContent: name }));
  });
  const focused = document.activeElement?.name === "head";
  $("heads").replaceChildren(...choices);
  if (focused) choices[chosen]?.querySelector("input").focus();
}

const chosenHead = () => Number(document.querySelector("input[name=head]:checked")?.value ?? 0);

export function draw() {
  const { bitmap, maps } = app.shown;
  const map = maps[chosenHead()];
  const smooth = document.querySelector("input[name=drawn]:checked").value === "smooth";
  const layer = map ? document.createElement("canvas") : null;
  if (map) paint(layer, map, smooth);
  const { crop, resize } = app.encoder.manifest.transform;
  compose($("picture"), bitmap, crop / resize, { layer, opacity: $("opacity").value / 100, smooth });
  $("attention-note").textContent = map ? noteOf(map) : "This encoder has no attention to show.";
  if (bitmap && bitmap.width !== bitmap.height) $("attention-note").textContent += " The encoder sees the square in the middle.";
  if (!bitmap) $("attention-note").textContent += ` The browser cannot show this format${map ? ", so the map stands alone" : ""}.`;
  const name = $("picture-name").textContent;
  const head = chosenHead() ? `head ${chosenHead() - 1}` : "the mean of all heads";
  $("picture").ariaLabel = map ? `${name} with the attention of ${head} on it` : name;
}

function noteOf({ h, w, values }) {
  const strongest = values.reduce((a, b) => Math.max(a, b));
  const times = (strongest * h * w).toFixed(1);
  return `The brightest of ${h} × ${w} patches has ${percent(strongest, 1)} of the attention, ${times} times an even share.`;
}
