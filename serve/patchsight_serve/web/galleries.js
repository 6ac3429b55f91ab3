// Which gallery the page is about, and what is done with it as a whole.

import { call, galleryName, ofGallery } from "./api.js";
import { confirmed } from "./confirm.js";
import { $, el, plural } from "./elements.js";
import { complain } from "./messages.js";
import { app } from "./state.js";

const NEW = "";

let whenChosen = () => null;

/** Fill the chooser; the gallery that the address names is in it, even where it is yet to be made. */
export function showGalleries() {
  const name = galleryName();
  const known = app.galleries.some((gallery) => gallery.name === name);
  const all = known ? app.galleries : [...app.galleries, { name, count: 0 }];
  const options = all.map(({ name: value, count }) => el("option", { value, textContent: `${value} (${count ?? "cannot be read"})` }));
  $("galleries").replaceChildren(...options, el("option", { value: NEW, textContent: "New gallery…" }));
  $("galleries").value = name;
  $("gallery-files").hidden = !app.gallery.count;
}

/** chosen: done when the address names another gallery. */
export function onGalleryChosen(chosen) {
  whenChosen = chosen;
  addEventListener("popstate", () => galleryName() !== $("galleries").value && chosen()); // the way back may lead to one
}

/** Go there, with the pictures that the person brought and with the view that is open. */
function goTo(name) {
  const url = new URL(location.href);
  url.searchParams.set("gallery", name);
  if (url.hash.startsWith("#/image/")) url.hash = "#/";
  history.pushState(null, "", url);
  $("new-gallery").hidden = true;
  whenChosen();
}

/** Fetched, as a link could not send the API key, and then handed to the browser as a file. */
async function save(part, name) {
  $("gallery-saving").textContent = "Being prepared…";
  try {
    const url = URL.createObjectURL(await (await call(ofGallery(`gallery/${part}`))).blob());
    el("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  } catch (error) {
    complain(error, () => save(part, name));
  }
  $("gallery-saving").textContent = "";
}

async function remove() {
  const name = galleryName();
  const text = `${plural(app.gallery.count, "picture")} will be gone for good. To go on, type its name: ${name}`;
  if (!(await confirmed(`Delete the gallery “${name}”?`, text, "Delete it", name))) return;
  try {
    await call(ofGallery("gallery"), { method: "DELETE" });
    location.assign(location.pathname);
  } catch (error) {
    complain(error, remove);
  }
}

$("galleries").addEventListener("change", ({ target }) => {
  if (target.value !== NEW) return goTo(target.value);
  target.value = galleryName();
  $("new-gallery").hidden = false;
  $("new-name").focus();
});
$("new-gallery").addEventListener("submit", (event) => {
  event.preventDefault();
  goTo($("new-name").value);
});
$("save-vectors").addEventListener("click", () => save("export", `${galleryName()}.parquet`));
$("save-backup").addEventListener("click", () => save("backup", `${galleryName()}.sqlite`));
$("delete-gallery").addEventListener("click", remove);
