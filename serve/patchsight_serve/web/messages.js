// What the page says when something went wrong, and what it asks for: the API key.

import { ApiError, Lost, alive, pause } from "./api.js";
import { $ } from "./elements.js";

const RETRY_MS = 1500;
const TITLES = {
  400: "This cannot be read.",
  401: "An API key is needed.",
  404: "It is not there.",
  409: "That does not fit.",
  413: "Too large.",
  415: "Not an image that this server reads.",
  422: "This image is damaged.",
  429: "The server is busy.",
  503: "The server is not ready.",
  504: "That took too long.",
  507: "The server's disk is full.",
};

export const titleOf = (error) => TITLES[error.status] ?? "Something went wrong.";

/** Say what went wrong. A server that is lost is waited for, and `again` is done when it is back. */
export function complain(error, again, prefix = "") {
  const lost = error instanceof Lost;
  if (!lost && !(error instanceof ApiError)) console.error(error);
  if (lost) {
    tell("The server does not answer.", "The page goes on as soon as it is back.");
    waitFor(again);
  } else {
    const worthwhile = [401, 429, 503, 504].includes(error.status);
    tell(titleOf(error), prefix + error.message, worthwhile ? again : null);
  }
}

/** A message above the picture; with `again`, a button that tries again. */
export function tell(title, text, again = null) {
  $("notice-title").textContent = title;
  $("notice-text").textContent = text;
  $("notice").hidden = false;
  $("retry").hidden = !again;
  $("retry").onclick = () => {
    $("notice").hidden = true;
    again();
  };
}

let waiting = false;

async function waitFor(again) {
  if (waiting) return;
  waiting = true;
  while (!(await alive())) await pause(RETRY_MS);
  waiting = false;
  $("notice").hidden = true;
  again();
}

/** The dialog that asks for the API key: resolves to it, or to null. */
export function askForKey(refused) {
  const dialog = $("key-dialog");
  if (refused) $("key-note").textContent = "The server refused that key. Try another one.";
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => {
    dialog.onclose = () => done(dialog.returnValue || null);
  });
}

$("key-dialog").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key-dialog").close($("key").value.trim());
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close(""));

$("dismiss").addEventListener("click", () => ($("notice").hidden = true));
