// The gallery in groups: what it is made of, and which of its pictures are nearly the same.

import { clusters } from "./clusters.js";
import { duplicates } from "./duplicates.js";
import { $, el } from "./elements.js";
import { app } from "./state.js";

export async function openGroups() {
  if (!app.gallery.count) {
    $("groups").replaceChildren(el("p", { className: "note", textContent: "The gallery is empty: there is nothing to group yet." }));
    return;
  }
  const sections = [clusters(), duplicates()];
  $("groups").replaceChildren(...sections.map(({ section }) => section));
  await Promise.all(sections.map(({ fill }) => fill()));
}
