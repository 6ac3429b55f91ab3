// How busy the server is, from its /metrics, while the panel is open and on view.

import { Lost, call, pause } from "./api.js";
import { $, el } from "./elements.js";
import { titleOf } from "./messages.js";
import { grown, parse, quantile, sum } from "./prometheus.js";

const EVERY_MS = 2000;
const WINDOW = 15; // looks that the times are made of: half a minute
const KEPT = 60; // of the line
const PICTURES = ["/embed", "/attention", "/neighbors", "/neighbors/region", "/gallery/images", "/v1/embeddings"];
const ofPictures = ({ route }) => PICTURES.includes(route);
const TIMES = [
  ["A whole request", "patchsight_request_duration_seconds", ofPictures],
  ["decoding", "patchsight_decode_seconds"],
  ["waiting", "patchsight_queue_seconds"],
  ["the encoder", "patchsight_infer_seconds"],
  ["writing the reply", "patchsight_encode_seconds"],
];

let running = false;

async function watch() {
  if (running) return;
  running = true;
  const looks = []; // {at, samples}, the newest last
  const rates = [];
  while ($("pulse").open) {
    if (!document.hidden) await look(looks, rates);
    await pause(EVERY_MS);
  }
  running = false;
}

async function look(looks, rates) {
  try {
    looks.push({ at: performance.now(), samples: parse(await (await call("metrics")).text()) });
  } catch (error) {
    looks.length = rates.length = 0; // what it counts begins anew with the server
    $("pulse-note").textContent = error instanceof Lost ? "The server does not answer." : `Its metrics are closed to this page. ${titleOf(error)} ${error.message}`;
    $("pulse-body").hidden = true;
    return;
  }
  if (looks.length < 2) return;
  while (looks.length > WINDOW) looks.shift();
  const [before, after] = looks.slice(-2);
  rates.push((1000 * grown(before.samples, after.samples, "patchsight_images_total")) / (after.at - before.at));
  while (rates.length > KEPT) rates.shift();
  show(looks[0].samples, after.samples, rates);
}

function show(before, after, rates) {
  $("pulse-note").textContent = "";
  $("pulse-body").hidden = false;
  const batches = grown(before, after, "patchsight_batch_size_count");
  const batch = batches ? (grown(before, after, "patchsight_batch_size_sum") / batches).toFixed(1) : "–";
  const facts = [
    ["images a second", rates.at(-1).toFixed(1)],
    ["images in work", sum(after, "patchsight_admitted_images")],
    ["images in a batch", batch],
    ["refused in half a minute", grown(before, after, "patchsight_rejected_requests_total")],
  ];
  const fact = ([term, value]) => el("div", {}, el("dt", { textContent: term }), el("dd", { textContent: value }));
  $("pulse-facts").replaceChildren(...facts.map(fact));
  const rows = TIMES.map(([name, metric, wanted]) => {
    const cells = [0.5, 0.95].map((q) => el("td", { textContent: milliseconds(quantile(before, after, metric, q, wanted)) }));
    return el("tr", {}, el("th", { scope: "row", textContent: name }), ...cells);
  });
  $("pulse-times").replaceChildren(...rows);
  line(rates);
}

const milliseconds = (seconds) => (seconds === null ? "–" : `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`);

/** Images a second, the newest at the right; the highest touches the top. */
function line(rates) {
  const top = Math.max(...rates, 1);
  const points = rates.map((rate, i) => `${KEPT - rates.length + i},${(24 - (23 * rate) / top).toFixed(1)}`);
  $("pulse-line").setAttribute("points", points.join(" "));
}

$("pulse").addEventListener("toggle", () => $("pulse").open && watch());
