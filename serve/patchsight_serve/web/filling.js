// Many pictures into the gallery: a few requests at a time, with what became of each, until the person cancels.

import { ApiError, Lost, alive, galleryName, pause } from "./api.js";
import { folderOf } from "./drop.js";
import { $, el, megabytes, plural } from "./elements.js";
import { complain, titleOf } from "./messages.js";
import { app } from "./state.js";
import { keep } from "./upload.js";

const AT_ONCE = 4;
const RETRY_MS = 1500;
const OF_THE_FILE = [400, 413, 415, 422, 504]; // errors that say nothing about the next one

let cancel = null; // of the work that is going on
let wait = ""; // what is waited for, in words
let whenFilled = () => null;

const pending = () => app.uploads.filter(({ url, id }) => url && !id);

/** Offer to add all that the person brought, where there are several. */
export function offerAll() {
  if (cancel) return;
  const files = pending().map(({ file }) => file);
  const folders = new Set(files.map(folderOf).filter(Boolean));
  $("add-all").hidden = files.length < 2;
  $("add-all-button").textContent = `Add all ${files.length} to the gallery`;
  $("by-folder").parentElement.hidden = !folders.size;
  $("by-folder").checked = folders.size > 0;
}

/** filled: done when all that could be added is in the gallery, or the person has canceled the rest. */
export function onFilled(filled) {
  whenFilled = filled;
}

async function addAll() {
  const work = { gallery: galleryName(), todo: pending(), all: pending(), sent: new Map(), added: 0, there: 0, bad: [] };
  const label = $("label-all").value.trim();
  const byFolder = $("by-folder").checked;
  work.labelOf = (file) => (byFolder && folderOf(file)) || label;
  work.stop = cancel = new AbortController();
  wait = "";
  $("add-all").hidden = true;
  $("filling").hidden = false;
  $("gallery-choice").inert = true; // all go into the same one
  $("filling-cancel").hidden = $("filling-bar").hidden = false;
  $("filling-cancel").focus();
  $("bad-files").hidden = true;
  report(work);
  const outcome = await Promise.allSettled(Array.from({ length: AT_ONCE }, () => worker(work)));
  const failed = outcome.find(({ status }) => status === "rejected")?.reason;
  cancel = null;
  await conclude(work, failed);
}

async function worker(work) {
  const goesOn = () => !work.stop.signal.aborted && work.gallery === galleryName(); // the way back leads to another one
  for (let upload; goesOn() && (upload = work.todo.shift()); ) {
    try {
      await add(upload, work);
    } catch (error) {
      if (!(error instanceof ApiError) || !OF_THE_FILE.includes(error.status)) {
        work.todo.unshift(upload);
        if (!work.stop.signal.aborted) work.stop.abort(error); // it would be the same for the others
        throw error;
      }
      work.bad.push({ upload, reason: error.message });
    }
    work.sent.set(upload, upload.file.size);
    report(work);
  }
}

async function add(upload, work) {
  const { file } = upload;
  const about = { label: work.labelOf(file), metadata: file.path && JSON.stringify({ path: file.path }) };
  const progress = (bytes) => {
    work.sent.set(upload, Math.min(bytes, file.size));
    report(work);
  };
  const busy = (seconds) => say(work, `The server is full, and asks to wait ${plural(seconds, "second")}.`);
  for (;;) {
    try {
      const { created } = await keep(upload, about, { progress, busy, signal: work.stop.signal });
      wait = "";
      return created ? work.added++ : work.there++;
    } catch (error) {
      const lost = error instanceof Lost;
      if (!lost && error.status !== 503) throw error;
      say(work, lost ? "The server does not answer. This goes on as soon as it is back." : `${titleOf(error)} Waiting for it.`);
      do await pause(RETRY_MS, work.stop.signal);
      while (!work.stop.signal.aborted && !(await alive()));
      work.stop.signal.throwIfAborted();
    }
  }
}

function say(work, text) {
  wait = text;
  report(work);
}

function report({ all, todo, added, there, bad, sent }) {
  const ended = added + there + bad.length;
  const bytes = [...sent.values()].reduce((sum, n) => sum + n, 0);
  const total = all.reduce((sum, { file }) => sum + file.size, 0);
  $("filling-bar").max = total || 1;
  $("filling-bar").value = bytes;
  $("filling-text").textContent = `${ended} of ${plural(all.length, "picture")} · ${megabytes(bytes)} of ${megabytes(total)}`;
  $("filling-wait").textContent = wait;
  $("filling-bar").ariaLabel = `${todo.length} still to be added`;
}

async function conclude({ todo, added, there, bad, stop }, failed) {
  $("filling-cancel").hidden = $("filling-bar").hidden = true;
  $("gallery-choice").inert = false;
  $("filling-wait").textContent = "";
  const parts = [`${plural(added, "picture")} added`];
  if (there) parts.push(`${there} there already`);
  if (bad.length) parts.push(`${bad.length} refused`);
  if (todo.length) parts.push(`${todo.length} not added${stop.signal.reason === "canceled" ? ", as you canceled" : ""}`);
  $("filling-text").textContent = `${parts.join(" · ")}.`;
  $("bad-files").hidden = !bad.length;
  const lines = bad.map(({ upload, reason }) => el("li", {}, el("b", { textContent: upload.file.path ?? upload.file.name }), `: ${reason}`));
  $("bad-files").replaceChildren(...lines);
  for (const { upload } of bad) {
    URL.revokeObjectURL(upload.url);
    upload.url = null;
  }
  offerAll();
  await whenFilled();
  if (failed && stop.signal.reason !== "canceled") complain(failed, addAll);
}

$("add-all").addEventListener("submit", (event) => {
  event.preventDefault();
  addAll();
});
$("filling-cancel").addEventListener("click", () => cancel?.abort("canceled"));
