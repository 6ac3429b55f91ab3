// The page: which picture is shown, what the encoder says of it, and the way from neighbor to neighbor.
//
// What is shown stands in the address, so every picture is a link, and the browser's way back works. Whatever comes
// from the server is set as text.

import { watchAcross } from "./across.js";
import { ApiError, callJson, ofGallery, onKeyNeeded } from "./api.js";
import "./bring.js";
import "./camera.js";
import { choose, showBeside } from "./card.js";
import { showCompare, watchCompare } from "./compare.js";
import { $, plural } from "./elements.js";
import { onEntryChanged, showEntry } from "./entry.js";
import { offerAll, onFilled } from "./filling.js";
import { onGalleryChosen } from "./galleries.js";
import { enterGallery, readGallery, showStrip, watchGallery } from "./gallery.js";
import { askForKey, complain, tell } from "./messages.js";
import { neighborsOf, showNeighbors } from "./neighbors.js";
import { chooseIn, layPatches, watchPatches } from "./patch.js";
import { embed, showPicture } from "./picture.js";
import "./pulse.js";
import { app } from "./state.js";
import { address, addressed, bitmapOf, bytesOf, nameOf, settleAt, targetOf } from "./target.js";
import { markCurrent, walk } from "./trail.js";
import { keep } from "./upload.js";
import { openView, showView, viewOf } from "./views.js";

let coming = {}; // the key of what is on its way; it is dropped if the person goes on before it comes

/* ---- What is shown ---- */

async function start() {
  try {
    app.encoders = (await callJson("encoders")).encoders;
    const named = addressed("encoder");
    choose(app.encoders.find((e) => e.name === named) ?? app.encoders.find((e) => e.default) ?? app.encoders[0]);
    await route();
    watchGallery(() => (app.shown && !viewOf(location.hash) ? refresh() : route()));
  } catch (error) {
    complain(error, start);
  }
}

/** Show what the address names, of the gallery that it names. */
async function route() {
  try {
    await enterGallery();
  } catch (error) {
    return complain(error, route);
  }
  const view = viewOf(location.hash);
  const target = targetOf(location.hash);
  const key = (target ?? app.shown?.target)?.key;
  if (coming.key !== (view ?? key)) drop();
  if (view) return openView(view).catch((error) => complain(error, route));
  if (app.shown && key === app.shown.target.key) {
    if (target) chooseIn(target.box);
    return settle(app.shown.target);
  }
  const next = target ?? targetOf($("strip").querySelector("a")?.hash ?? "");
  if (next) return open(next);
  $("view").hidden = true; // there is nothing to show
  document.title = "patchsight";
}

/** The picture's view, with this target as its address. */
function settle(target) {
  showView("view");
  document.title = `${nameOf(target)} · patchsight`;
  settleAt(target);
}

/** Once more, and what the address names: the person may be on their way. */
const refresh = () => open(targetOf(location.hash) ?? app.shown.target);

/** What is on its way is not waited for any more. */
function drop() {
  coming = {};
  document.body.classList.remove("busy");
}

async function open(target) {
  const mine = (coming = { key: target.key });
  document.body.classList.add("busy");
  $("notice").hidden = true; // it was about what was there before
  try {
    const about = target.id ? callJson(ofGallery(`gallery/images/${encodeURIComponent(target.id)}`)) : null;
    const bytes = await bytesOf(target);
    const [seen, found, image, bitmap] = await Promise.all([
      embed(bytes),
      neighborsOf(target, bytes),
      about,
      bitmapOf(target, bytes),
    ]);
    if (mine !== coming) return;
    show({ target, bytes, bitmap, image, found, ...seen });
  } catch (error) {
    if (mine === coming) fail(error, target);
  } finally {
    if (mine === coming) document.body.classList.remove("busy");
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
    offerAll();
  }
  if (app.shown) settleAt(app.shown.target);
  else history.replaceState(null, "", location.pathname + location.search);
}

function show(shown) {
  const walked = $("view").contains(document.activeElement);
  walk(shown.target);
  app.shown = shown;
  settle(shown.target);
  const { target, image, found } = shown;
  const name = nameOf(target);
  $("picture-name").textContent = name;
  $("picture-label").textContent = image ? (image.label ? `labelled ${image.label}` : "without a label") : "not in the gallery";
  showPicture(shown);
  layPatches();
  showCompare();
  showNeighbors(found, image);
  if (document.activeElement === document.body && walked) $("view").focus(); // the link that it was on is gone
  $("add").hidden = !target.upload;
  showEntry(image);
  markCurrent();
  const votes = found.vote?.label ? `, which vote ${found.vote.label}` : "";
  $("status").textContent = `${name}: ${plural(found.neighbors.length, "neighbor")}${votes}.`;
}

/* ---- What the person adds ---- */

async function add(event) {
  event.preventDefault();
  const { upload } = app.shown.target;
  try {
    const { id, created } = await keep(upload, { label: $("label").value.trim() });
    await readGallery();
    $("label").value = "";
    if (created) location.hash = `#/image/${id}`;
    else tell("It is there already.", `The gallery holds this very picture as ${id}; nothing was changed.`);
  } catch (error) {
    complain(error, () => $("add").requestSubmit());
  }
}

/** All that they brought is in the gallery, or was refused. */
async function filled() {
  await readGallery().catch((error) => complain(error, filled));
  const added = app.shown?.target.upload?.id;
  if (added) location.hash = `#/image/${added}`;
  else await route();
}

function compareWith(name) {
  address("beside", name);
  showBeside();
  showCompare();
}

/* ---- Wiring ---- */

onKeyNeeded(askForKey);
onEntryChanged(async (gone) => {
  await readGallery();
  if (!gone) return refresh();
  app.shown = null;
  location.hash = "#/";
  await route();
});
onFilled(filled);
onGalleryChosen(() => {
  drop(); // what is on its way is of the gallery before
  return route();
});
$("only-label").addEventListener("change", refresh);
$("add").addEventListener("submit", add);
watchPatches();
watchAcross();
watchCompare();
$("encoder").addEventListener("change", ({ target }) => {
  const chosen = app.encoders.find(({ name }) => name === target.value);
  address("encoder", chosen.default ? null : chosen.name);
  choose(chosen);
  if (viewOf(location.hash)) app.shown = null; // seen anew when the person comes back to it
  else if (app.shown) refresh();
});
$("beside").addEventListener("change", ({ target }) => compareWith(target.value || null));
$("beside-end").addEventListener("click", () => compareWith(null));
addEventListener("hashchange", route);

start();
