// The encoder: which one is chosen, and what its manifest says of it.

import { $, el, percent } from "./elements.js";
import { app } from "./state.js";

const OBJECTIVES = { simclr: "SimCLR", mae: "MAE", dino: "DINO" };

export function choose(encoder) {
  app.encoder = encoder;
  const several = app.encoders.length > 1;
  $("encoder").hidden = !several;
  $("encoder-name").hidden = several;
  $("encoder-name").textContent = encoder.name;
  $("encoder").replaceChildren(
    ...app.encoders.map(({ name }) => el("option", { value: name, textContent: name, selected: name === encoder.name })),
  );
  const { objective, architecture, parameters, embedding_dim, recommended, data, license, measured } = encoder.manifest;
  const knn = Object.entries(measured).filter(([, m]) => m?.headline?.accuracy);
  const facts = [
    ["Objective", OBJECTIVES[objective] ?? objective],
    ["Architecture", `${architecture}, ${(parameters / 1e6).toFixed(1)} M parameters`],
    ["Embedding", `${embedding_dim * (recommended === "both" ? 2 : 1)} numbers`],
    ...knn.map(([name, m]) => [`${m.headline.k}-NN`, `${percent(m.headline.accuracy, 1)} (${name})`]),
    ["Data", data],
    ["License", license],
  ];
  const fact = ([term, text]) => el("div", {}, el("dt", { textContent: term }), el("dd", { textContent: text }));
  $("card").replaceChildren($("card").firstElementChild, ...facts.map(fact));
}
