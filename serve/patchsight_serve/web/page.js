// The page: which picture is shown, what the encoder says of it, and the way from neighbor to neighbor.
//
// What is shown stands in the address: #/image/ID is a picture of the gallery, #/upload/N one of the person's own. So
// every picture is a link, and the browser's way back works. Whatever comes from the server is set as text.

import { ApiError, call, callJson, onKeyNeeded, pause } from "./api.js";
import { compose, mean, paint, unpackHeads } from "./attention.js";
import { $, el, percent, plural } from "./elements.js";
import { askForKey, complain, tell, titleOf } from "./messages.js";
import { thumbnail } from "./thumbnails.js";

const NEIGHBORS = 12;
const SAMPLES = 10;
const OBJECTIVES = { simclr: "SimCLR", mae: "MAE", dino: "DINO" };
const WATCH_MS = 1500;
const app = {
  encoders: [],
  encoder: null, // its entry of /encoders
  gallery: { count: 0, encoder: null },
  images: [], // the first of the gallery, for samples and labels
  uploads: [], // {file, url, id}: id once it is in the gallery
  shown: null, // {target, bitmap, maps, …} as `open` made it
  trail: [], // targets, from where the walk began
  turn: 0, // a reply that comes after the person went on is dropped
};

/* ---- Start ---- */

async function start() {
  try {
    app.encoders = (await callJson("encoders")).encoders;
    choose(app.encoders.find((e) => e.default) ?? app.encoders[0]);
    await readGallery();
    await route();
    watchGallery();
  } catch (error) {
    complain(error, start);
  }
}

function choose(encoder) {
  app.encoder = encoder;
  const several = app.encoders.length > 1;
  $("encoder").hidden = !several;
  $("encoder-name").hidden = several;
  $("encoder-name").textContent = encoder.name;
  $("encoder").replaceChildren(
    ...app.encoders.map(({ name }) => el("option", { value: name, textContent: name, selected: name === encoder.name })),
  );
  const { objective, architecture, parameters, embedding_dim, data, license, measured } = encoder.manifest;
  const knn = Object.entries(measured).filter(([, m]) => m?.headline?.accuracy);
  const facts = [
    ["Objective", OBJECTIVES[objective] ?? objective],
    ["Architecture", `${architecture}, ${(parameters / 1e6).toFixed(1)} M parameters`],
    ["Embedding", `${embedding_dim} numbers`],
    ...knn.map(([name, m]) => [`${m.headline.k}-NN`, `${percent(m.headline.accuracy, 1)} (${name})`]),
    ["Data", data],
    ["License", license],
  ];
  const fact = ([term, text]) => el("div", {}, el("dt", { textContent: term }), el("dd", { textContent: text }));
  $("card").replaceChildren($("card").firstElementChild, ...facts.map(fact));
}

/* ---- The gallery as a whole ---- */

async function readGallery() {
  app.gallery = await callJson("gallery");
  app.images = (await callJson("gallery/images?limit=1000")).images;
  const { count, encoder } = app.gallery;
  const by = encoder ? `, as ${encoder.name} sees them` : "";
  $("gallery-note").textContent = count ? `The gallery holds ${plural(count, "picture")}${by}.` : "The gallery is empty.";
  const labels = [...new Set(app.images.map((image) => image.label).filter(Boolean))];
  $("labels").replaceChildren(...labels.map((value) => el("option", { value })));
  showStrip();
}

/** At its first start the server indexes its sample photos: go along until the gallery no longer grows. */
async function watchGallery() {
  for (let still = 0; still < (app.gallery.count ? 2 : 8); still++) {
    await pause(WATCH_MS);
    const before = app.gallery.count;
    const now = await callJson("gallery").catch(() => app.gallery);
    if (now.count === before) continue;
    still = -1;
    await readGallery().catch(() => null);
    if (app.shown) await refresh();
    else await route();
  }
}

/** The person's own pictures, then one of the gallery of each label in turn. */
function showStrip() {
  const byLabel = Map.groupBy ? [...Map.groupBy(app.images, (image) => image.label).values()] : [app.images];
  const samples = [];
  for (let i = 0; samples.length < Math.min(SAMPLES, app.images.length); i++) {
    samples.push(...byLabel.map((images) => images[i]).filter(Boolean));
  }
  const own = app.uploads.map(({ file, url, id }, n) => ({
    key: id ? `#/image/${id}` : `#/upload/${n}`,
    name: file.name,
    source: url,
  }));
  const rest = samples.filter(({ id }) => !ownOf(id)).slice(0, SAMPLES).map(({ id, label }) => ({ key: `#/image/${id}`, name: label ?? id, id }));
  const tiles = [...own.filter((tile) => tile.source), ...rest].map(({ key, name, source, id }) => {
    const image = source ? el("img", { src: source, alt: name }) : thumbnail(id, name);
    const link = el("a", { href: key, title: name }, image);
    image.addEventListener("error", () => link.replaceChildren(el("span", { textContent: name })));
    return el("li", {}, link);
  });
  $("strip").replaceChildren(...tiles);
  $("strip-title").hidden = !tiles.length;
  $("strip-title").textContent = own.length ? "Yours, and some of the gallery" : "Or start with one of these";
  markCurrent();
}

function markCurrent() {
  for (const link of document.querySelectorAll("#strip a, #trail a")) {
    if (link.hash === app.shown?.target.key) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

/* ---- Pictures ---- */

/** The upload that became the gallery's image of this id, if it was one. */
const ownOf = (id) => app.uploads.find((upload) => upload.id === id);

const nameOf = ({ upload, id }) => (upload ?? ownOf(id))?.file.name ?? id;

/** The bytes to encode: the person's own file where there is one, else the gallery's thumbnail. */
async function bytesOf({ upload, id }) {
  const own = upload ?? ownOf(id);
  return own ? own.file : (await call(`gallery/images/${encodeURIComponent(id)}/thumbnail`)).blob();
}

function take(files) {
  const first = app.uploads.length;
  app.uploads.push(...[...files].map((file) => ({ file, url: URL.createObjectURL(file), id: null })));
  if (app.uploads.length === first) return;
  showStrip();
  location.hash = `#/upload/${first}`;
}

/* ---- What is shown ---- */

/** What an address names: `{key, upload}`, `{key, id}`, or null. */
function targetOf(hash) {
  const [, kind, name] = hash.match(/^#\/(image|upload)\/([\w.-]+)$/) ?? [];
  if (kind === "image") return { key: hash, id: name };
  return kind === "upload" && app.uploads[name]?.url ? { key: hash, upload: app.uploads[name] } : null;
}

async function route() {
  const target = targetOf(location.hash);
  if (target) return target.key === app.shown?.target.key ? null : open(target);
  const first = $("strip").querySelector("a");
  return first && !app.shown ? open(targetOf(first.hash)) : null;
}

/** Once more, and what the address names: the person may be on their way. */
const refresh = () => open(targetOf(location.hash) ?? app.shown.target);

async function open(target) {
  const turn = ++app.turn;
  document.body.classList.add("busy");
  try {
    const about = target.id ? callJson(`gallery/images/${encodeURIComponent(target.id)}`) : null;
    const bytes = await bytesOf(target);
    const [seen, found, image, bitmap] = await Promise.all([
      embed(bytes),
      neighborsOf(target, bytes),
      about,
      createImageBitmap(bytes).catch(() => null), // the server reads formats that a browser does not
    ]);
    if (turn !== app.turn) return;
    show({ target, bitmap, image, found, ...seen });
  } catch (error) {
    if (turn === app.turn) fail(error, target);
  } finally {
    if (turn === app.turn) document.body.classList.remove("busy");
  }
}

/** Say why a picture cannot be shown, and stay with the one before. */
function fail(error, target) {
  const named = target.upload && error instanceof ApiError ? `${target.upload.file.name}: ` : "";
  complain(error, () => open(target), named);
  if (target.upload && [400, 413, 415, 422].includes(error.status)) {
    URL.revokeObjectURL(target.upload.url);
    target.upload.url = null;
    showStrip();
  }
  history.replaceState(null, "", app.shown?.target.key ?? location.pathname + location.search);
}

async function embed(bytes) {
  const wanted = "attention" in app.encoder.outputs ? "embedding,attention" : "embedding";
  const query = new URLSearchParams({ encoder: app.encoder.name, outputs: wanted });
  const reply = await callJson(`embed?${query}`, { method: "POST", body: bytes, type: "application/octet-stream" });
  const { embedding, attention } = reply.results[0];
  const heads = attention ? unpackHeads(attention) : [];
  return { embedding, maps: heads.length ? [mean(heads), ...heads] : [], took: reply.took };
}

/** Neighbors as the gallery's own encoder sees them; an error here is no reason to withhold the attention. */
async function neighborsOf({ id }, bytes) {
  const query = new URLSearchParams({ k: NEIGHBORS, vote: true });
  if (!app.gallery.encoder) query.set("encoder", app.encoder.name);
  try {
    if (id) return await callJson(`neighbors?${new URLSearchParams({ id })}&${query}`);
    return await callJson(`neighbors?${query}`, { method: "POST", body: bytes, type: "application/octet-stream" });
  } catch (error) {
    if (error instanceof ApiError) return { neighbors: [], error };
    throw error;
  }
}

function show(shown) {
  walk(shown.target);
  app.shown = shown;
  if (location.hash !== shown.target.key) history.replaceState(null, "", shown.target.key);
  const { target, image, embedding, maps, found } = shown;
  const name = nameOf(target);
  $("notice").hidden = true;
  $("view").hidden = false;
  document.title = `${name} · patchsight`;
  $("picture-name").textContent = name;
  $("picture-label").textContent = image ? (image.label ? `labelled ${image.label}` : "without a label") : "not in the gallery";
  showHeads(maps);
  draw();
  $("summary-title").textContent = `Its summary: ${embedding.length} numbers`;
  paint($("summary"), { h: 1, w: embedding.length, values: embedding });
  $("embed-time").textContent = timeOf(shown.took);
  showNeighbors(found, image);
  $("add").hidden = !target.upload;
  markCurrent();
  const votes = found.vote?.label ? `, which vote ${found.vote.label}` : "";
  $("status").textContent = `${name}: ${plural(found.neighbors.length, "neighbor")}${votes}.`;
}

/** Keep the way: a click on a neighbor goes on, one on the way goes back, anything else begins anew. */
function walk(target) {
  const known = app.trail.findIndex((step) => step.key === target.key);
  const near = app.shown?.found.neighbors.some(({ id }) => id === target.id);
  if (known >= 0) app.trail.length = known + 1;
  else app.trail = near ? [...app.trail, target] : [target];
  const steps = app.trail.map((step) => {
    const name = nameOf(step);
    const picture = step.upload ? el("img", { src: step.upload.url, alt: name }) : thumbnail(step.id, name);
    return el("li", {}, el("a", { href: step.key, title: name }, picture));
  });
  $("trail").firstElementChild.replaceChildren(...steps);
  $("trail").hidden = steps.length < 2;
}

/* ---- Attention ---- */

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

function draw() {
  const { bitmap, maps } = app.shown;
  const map = maps[chosenHead()];
  const smooth = document.querySelector("input[name=drawn]:checked").value === "smooth";
  const layer = map ? document.createElement("canvas") : null;
  if (map) paint(layer, map, smooth);
  const { crop, resize } = app.encoder.manifest.transform;
  compose($("picture"), bitmap, crop / resize, { layer, opacity: $("opacity").value / 100, smooth });
  $("attention-note").textContent = map ? noteOf(map) : "This encoder has no attention to show.";
  if (bitmap && bitmap.width !== bitmap.height) $("attention-note").textContent += " The encoder sees the square in the middle.";
  if (!bitmap) $("attention-note").textContent += " The browser cannot show this format, so the map stands alone.";
  const name = $("picture-name").textContent;
  const head = chosenHead() ? `head ${chosenHead() - 1}` : "the mean of all heads";
  $("picture").ariaLabel = map ? `${name} with the attention of ${head} on it` : name;
}

function noteOf({ h, w, values }) {
  const strongest = values.reduce((a, b) => Math.max(a, b));
  const times = (strongest * h * w).toFixed(1);
  return `The brightest of ${h} × ${w} patches has ${percent(strongest, 1)} of the attention, ${times} times an even share.`;
}

/* ---- Neighbors ---- */

function showNeighbors({ neighbors, vote, error, took }, image) {
  const tiles = neighbors.map(({ id, score, label }) => {
    const name = el("span", { className: label && label === vote?.label ? "name agrees" : "name", textContent: label ?? id });
    const value = el("span", { className: "score", textContent: score.toFixed(3), title: "cosine similarity" });
    return el("li", {}, el("a", { href: `#/image/${id}`, title: id }, thumbnail(id, `Picture ${id}`), name, value));
  });
  $("neighbors").replaceChildren(...tiles);
  $("vote").hidden = !neighbors.length;
  if (neighbors.length) showVote(vote, image, neighbors.length);
  const other = app.gallery.encoder && app.gallery.encoder.name !== app.encoder.name;
  $("neighbors-note").textContent = error
    ? `${titleOf(error)} ${error.message}`
    : !neighbors.length
      ? app.gallery.count
        ? "There is no other picture in the gallery."
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

async function add(event) {
  event.preventDefault();
  const { upload } = app.shown.target;
  const label = $("label").value.trim();
  const query = new URLSearchParams(label ? { label } : {});
  if (!app.gallery.encoder) query.set("encoder", app.encoder.name);
  try {
    const body = { method: "POST", body: upload.file, type: "application/octet-stream" };
    const [{ id, created }] = (await callJson(`gallery/images?${query}`, body)).results;
    upload.id = id;
    await readGallery();
    $("label").value = "";
    if (created) location.hash = `#/image/${id}`;
    else tell("It is there already.", `The gallery holds this very picture as ${id}; nothing was changed.`);
  } catch (error) {
    complain(error, () => $("add").requestSubmit());
  }
}

function timeOf({ all, ...stages }) {
  const parts = Object.entries(stages).map(([stage, ms]) => `${stage} ${ms.toFixed(1)} ms`);
  return [...parts, `answered in ${all.toFixed(0)} ms`].join(" · ");
}

/* ---- Wiring ---- */

onKeyNeeded(askForKey);
$("key-dialog").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key-dialog").close($("key").value.trim());
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close(""));
$("dismiss").addEventListener("click", () => ($("notice").hidden = true));
$("add").addEventListener("submit", add);
$("opacity").addEventListener("input", draw);
$("controls").addEventListener("change", draw);
$("encoder").addEventListener("change", ({ target }) => {
  choose(app.encoders.find(({ name }) => name === target.value));
  if (app.shown) refresh();
});
$("file").addEventListener("change", ({ target }) => {
  take(target.files);
  target.value = ""; // so that the same file can be chosen again
});
addEventListener("hashchange", route);
addEventListener("paste", ({ clipboardData }) => take(clipboardData?.files ?? []));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  take(event.dataTransfer?.files ?? []);
});

start();
