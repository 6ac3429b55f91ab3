// The way from neighbor to neighbor, and where on it the person is.

import { $, el } from "./elements.js";
import { app } from "./state.js";
import { nameOf } from "./target.js";
import { thumbnail } from "./thumbnails.js";

let trail = []; // targets, from where the walk began

export const leaveTrail = () => (trail = []);

/** Keep the way: a click on a neighbor goes on, one on the way goes back, anything else begins anew. */
export function walk(target) {
  const known = trail.findIndex((step) => step.key === target.key);
  const near = [...(app.shown?.found.neighbors ?? []), ...(app.shown?.across ?? [])].some(({ id }) => id === target.id);
  if (known >= 0) trail.length = known + 1;
  else trail = near ? [...trail, target] : [target];
  const steps = trail.map((step) => {
    const name = nameOf(step);
    const picture = step.upload ? el("img", { src: step.upload.url, alt: name }) : thumbnail(step.id, name);
    return el("li", {}, el("a", { href: step.key, title: name }, picture));
  });
  $("trail").firstElementChild.replaceChildren(...steps);
  $("trail").hidden = steps.length < 2;
}

/** Mark the links to what is shown. */
export function markCurrent() {
  for (const link of document.querySelectorAll("#strip a, #trail a")) {
    if (link.hash === app.shown?.target.key) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}
