// What a person brings to the page: pictures chosen, pasted or dropped, which it shows before any of them is kept.

import { chosen, dropped } from "./drop.js";
import { $ } from "./elements.js";
import { offerAll } from "./filling.js";
import { showStrip } from "./gallery.js";
import { app } from "./state.js";

/** Show these files on the strip, and the first of them at large. */
export function take(files) {
  const first = app.uploads.length;
  app.uploads.push(...files.map((file) => ({ file, url: URL.createObjectURL(file), id: null })));
  if (app.uploads.length === first) return;
  showStrip();
  offerAll();
  location.hash = `#/upload/${first}`;
}

for (const id of ["file", "folder"]) {
  $(id).addEventListener("change", ({ target }) => {
    take(chosen(target.files));
    target.value = ""; // so that the same file can be chosen again
  });
}
addEventListener("paste", ({ clipboardData }) => take(chosen(clipboardData?.files ?? [])));
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
  if (event.dataTransfer) dropped(event.dataTransfer).then(take);
});
