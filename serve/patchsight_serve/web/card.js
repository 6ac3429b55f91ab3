// The encoder: which one is chosen, and what its manifest says of it.

import { second } from "./compare.js";
import { $, el, percent } from "./elements.js";
import { lengthOf } from "./picture.js";
import { app } from "./state.js";

const OBJECTIVES = { simclr: "SimCLR", mae: "MAE", dino: "DINO" };
const ENGINES = { onnxruntime: "ONNX Runtime", openvino: "OpenVINO", triton: "NVIDIA Triton" };
const SHORT = 12; // digits of a sha256 that tell encoders apart

export function choose(encoder) {
  app.encoder = encoder;
  const several = app.encoders.length > 1;
  $("encoder").hidden = !several;
  $("encoder-name").hidden = several;
  $("encoder-name").textContent = encoder.name;
  $("encoder").replaceChildren(...app.encoders.map(({ name }) => option(name, name, name === encoder.name)));
  showBeside();
  const fixed = [...$("card").children].slice(0, 2);
  $("card").replaceChildren(...fixed, ...mainFacts(encoder).map((fact) => el("div", {}, ...terms(fact))));
  $("card-rest").replaceChildren(...otherFacts(encoder).flatMap(terms));
}

/** The choice of a second encoder, as the address has it. */
export function showBeside() {
  const chosen = second();
  const others = app.encoders.filter((encoder) => encoder !== app.encoder);
  $("beside-box").hidden = !others.length;
  const options = others.map(({ name }) => option(name, name, name === chosen?.name));
  $("beside").replaceChildren(option("", "no other", !chosen), ...options);
}

const option = (value, textContent, selected) => el("option", { value, textContent, selected });

const terms = ([term, content]) => [el("dt", { textContent: term }), el("dd", {}, content)];

function mainFacts({ manifest }) {
  const { objective, architecture, parameters, license } = manifest;
  return [
    ["Objective", OBJECTIVES[objective] ?? objective],
    ["Architecture", `${architecture}, ${(parameters / 1e6).toFixed(1)} M parameters`],
    ["Embedding", `${lengthOf(manifest)} numbers`],
    ...judged(manifest).map(([name, { headline }]) => [`${headline.k}-NN`, `${percent(headline.accuracy, 1)} on ${name}`]),
    ["License", license],
  ];
}

function otherFacts({ manifest, runtime, sha256 }) {
  const { data, image_size, patch_size, num_heads, embedding_dim, recommended, measured, recipe, commit } = manifest;
  const side = image_size / patch_size;
  const summary = { cls: "the CLS token", mean: "the mean of the patches", both: "the CLS token and the mean of the patches" };
  const speed = measured.precision?.speed;
  return [
    ["Learned from", data],
    ["Sees", `${image_size} × ${image_size} pixels` + (patch_size ? `, in ${side} × ${side} patches of ${patch_size}` : "")],
    ["Embedding", `${summary[recommended]}, of ${embedding_dim} numbers${recommended === "both" ? " each" : ""}`],
    ["Attention", num_heads ? attention(manifest) : "none"],
    ...judged(manifest).map(([name, found]) => [`k-NN on ${name}`, accuracies(found)]),
    ["Runs on", engine(runtime)],
    ...(speed ? [["Speed", `${speed.toFixed(2)} × that of fp32, on the CPU that exported it`]] : []),
    ["Identity", el("span", { textContent: `sha256 ${sha256.slice(0, SHORT)}…`, title: sha256 })],
    ["Recipe", el("pre", { textContent: recipe.trim(), tabIndex: 0 })],
    ["Of commit", commit],
  ].filter(([, content]) => content);
}

/** What patchsight-knn measured, by the name of the images. */
function judged({ measured }) {
  const found = Object.entries(measured).filter(([, m]) => m?.headline?.accuracy);
  return found.map(([name, m]) => [name.replace(/-knn$/, ""), m]);
}

function accuracies({ accuracy, headline, train, test, classes }) {
  const by = Object.entries(accuracy ?? {}).map(([k, share]) => `${k}-NN ${percent(share, 1)}`);
  const [low, high] = headline.interval_95 ?? [];
  const sure = low ? `; with 20 neighbors between ${percent(low, 1)} and ${percent(high, 1)}, as sure as 95 %` : "";
  const images = train && test ? ` ${test.images.toLocaleString("en")} images, by the labels of ${train.images.toLocaleString("en")} others` : "";
  return `${by.join(", ")}${sure.replace("20", headline.k)}.${images}${classes ? `, ${classes} classes.` : ""}`;
}

function attention({ attention, num_heads }) {
  if (attention === "rollout") return "rolled out over all blocks, heads averaged";
  return `of ${attention === "last" ? "the last block" : `block ${attention}`}, in ${num_heads} heads`;
}

function engine({ engine, precision, cosine }) {
  const close = cosine === null ? "" : `; embeddings at a cosine of ${cosine.toFixed(5)} or more to ONNX Runtime's`;
  return `${ENGINES[engine] ?? engine}, in ${precision}${close}`;
}
