// Which of the views is open: the picture, the gallery as a map, or its groups.

import { $ } from "./elements.js";
import { openGroups } from "./groups.js";
import { openMap } from "./map.js";

const VIEWS = { map: openMap, groups: openGroups };
const TITLES = { map: "The map", groups: "The groups" };

/** The view that an address names, beside the picture: "map", "groups", or null. */
export const viewOf = (hash) => hash.match(/^#\/(map|groups)$/)?.[1] ?? null;

export function openView(name) {
  showView(name);
  document.title = `${TITLES[name]} · patchsight`;
  return VIEWS[name]();
}

/** Show the `<main>` of this id, and no other. */
export function showView(id) {
  for (const main of document.querySelectorAll("main")) main.hidden = main.id !== id;
  const here = id === "view" ? "#/" : `#/${id}`;
  for (const link of document.querySelectorAll("header nav a")) {
    if (link.hash === here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address says which view is open
  document.querySelector("main:not([hidden])").focus();
});
