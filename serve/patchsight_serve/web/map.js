// The gallery as a map: what is alike lies together. By principal components at once, by UMAP when the server has it.

import { callJson, galleryName, ofGallery, pause } from "./api.js";
import { Viewport } from "./viewport.js";
import { $, el, plural } from "./elements.js";
import { STEP, listen } from "./gestures.js";
import { classify, colorsOf, showLegend } from "./legend.js";
import { complain } from "./messages.js";
import { Plane } from "./plane.js";
import { app } from "./state.js";
import { thumbnail } from "./thumbnails.js";

const LOOK_MS = 2000; // between two questions whether UMAP is ready
const UNFINISHED = ["working", "waiting", "stale"];
const KEYS = "Arrow keys move it, plus and minus zoom, zero shows the whole, Enter opens the picture nearest to the middle.";
const BY = {
  pca: "By principal components: the plane on which the pictures differ most.",
  umap: "By UMAP: neighbors stay neighbors. How far apart two groups lie says little.",
};

const viewport = new Viewport();
let plane = null;
let of = null; // the gallery that is on it
let layouts = {}; // the server's reply for each method
let shown = null; // one of them
let method = "umap"; // that the person wants
let classes = [];
let turn = 0; // whoever asked before the last one is no longer waited for

export async function openMap() {
  const mine = ++turn;
  const reply = await askFor(method);
  if (mine !== turn) return;
  if (!reply.images) {
    plane = shown = null;
    const words = el("p", { className: "note" }, "The gallery is empty. ", el("a", { href: "#/", textContent: "Add pictures" }));
    words.append(", and this is where you see which of them are alike.");
    $("map").replaceChildren(el("h2", { textContent: "The gallery as a map" }), words);
    return;
  }
  if (!plane || of !== galleryName()) build();
  layouts = { [reply.method]: reply };
  show(reply);
  follow(reply.umap, mine).catch((error) => mine === turn && complain(error, openMap)); // nobody waits for that
}

const askFor = (wanted, query = {}) => callJson(ofGallery("gallery/map", { method: wanted, ...query }));

/** While UMAP is being made, go along; and have the points move when it is there. */
async function follow(umap, mine) {
  while (UNFINISHED.includes(umap.state)) {
    await pause(LOOK_MS);
    if (mine !== turn || location.hash !== "#/map" || of !== galleryName()) return; // the person has gone on
    ({ umap } = await askFor("umap", { limit: 0 }));
    if (mine !== turn) return;
    shown.umap = umap;
    if (umap.state === "ready") layouts.umap = await askFor("umap");
    if (mine !== turn) return;
    if (umap.state === "ready" && method === "umap") show(layouts.umap);
    else tellHow();
  }
}

async function choose(wanted) {
  method = wanted;
  const mine = turn;
  layouts[wanted] ??= await askFor(wanted);
  if (mine === turn && method === wanted) show(layouts[wanted]);
}

/* ---- What is on it ---- */

function build() {
  const canvas = el("canvas", { id: "plane", tabIndex: 0, role: "application", ariaLabel: `Map of the gallery. ${KEYS}` });
  plane = new Plane(canvas, viewport);
  of = galleryName();
  shown = null;
  viewport.whole();
  const radio = (value, text) => {
    const input = el("input", { type: "radio", name: "method", value });
    input.addEventListener("change", () => choose(value));
    return el("label", {}, input, el("span", { textContent: text }));
  };
  const legend = el("legend", { className: "visually-hidden", textContent: "Placed by" });
  const how = el("fieldset", { className: "switch" }, legend, radio("umap", "UMAP"), radio("pca", "Components"));
  const button = (textContent, ariaLabel, act) => {
    const made = el("button", { type: "button", textContent, ariaLabel, title: ariaLabel });
    made.addEventListener("click", () => {
      act();
      plane.changed();
    });
    return made;
  };
  const zoom = el("div", { className: "zoom" });
  zoom.append(button("+", "Closer", () => viewport.zoomBy(STEP)), button("−", "Farther", () => viewport.zoomBy(1 / STEP)));
  zoom.append(button("All", "The whole map", () => viewport.whole()));
  const tip = el("div", { id: "map-tip", hidden: true, ariaHidden: "true" });
  $("map").replaceChildren(
    el("div", { className: "map-head" }, el("h2", { textContent: "The gallery as a map" }), how),
    el("p", { id: "map-how", className: "note" }),
    el("div", { className: "map-frame" }, canvas, zoom, tip),
    el("ul", { id: "map-legend", ariaLabel: "Labels: press one to have it stand out" }),
  );
  listen(canvas, viewport, {
    moved: () => (pointAt(null), plane.changed()),
    pointedAt: (x, y) => pointAt(plane.nearest(x, y)),
    left: () => ((plane.reticle = false), pointAt(null)),
    opened: (x, y) => open(plane.nearest(x, y)),
    keyed: () => ((plane.reticle = true), pointAt(middle()), $("status").textContent = told(middle())),
    openedByKey: () => open(middle()),
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => plane && drawLegend());
}

function show(reply) {
  const moved = shown && shown.method !== reply.method;
  shown = reply;
  const { ids, labels, xs, ys } = reply;
  const known = classify(labels);
  const lit = plane.lit === null ? null : classes[plane.lit].name; // it may be another class's number now
  classes = known.classes;
  const found = classes.findIndex(({ name }) => name === lit);
  plane.lit = found < 0 ? null : found;
  plane.current = app.shown?.target.id ?? app.shown?.target.upload?.id ?? null;
  plane.show(ids, known, xs, ys);
  drawLegend();
  tellHow();
  if (moved) $("status").textContent = BY[reply.method];
}

function drawLegend() {
  showLegend($("map-legend"), classes, colorsOf(classes, plane.canvas), plane.lit, (lit) => {
    plane.lit = lit;
    plane.changed();
  });
}

/** Which plane this is, and how UMAP stands. */
function tellHow() {
  const { images, shown: here, umap, method: by } = shown;
  const some = here < images && umap.state !== "stale";
  const parts = [some ? `A sample of ${here.toLocaleString("en")} of ${plural(images, "picture")}.` : `${plural(here, "picture")}.`, BY[by]];
  const news = {
    working: "UMAP, which keeps neighbors together, is being made: the points will move when it is ready.",
    waiting: "UMAP is being made for another gallery; this one's comes after it.",
    stale: "The gallery has changed since; a new one is being made.",
    failed: `UMAP failed: ${umap.error}.`,
    not_installed: "This server has no UMAP: pip install 'patchsight[map]' adds it.",
    too_few: "For UMAP there are too few pictures.",
  }[umap.state];
  if (news) parts.push(news);
  $("map-how").textContent = parts.join(" ");
  for (const input of document.querySelectorAll("#map input[name=method]")) {
    input.disabled = input.value === "umap" && by !== "umap" && umap.state !== "ready";
    input.checked = input.value === by;
  }
}

/* ---- What the person points at ---- */

const middle = () => plane.nearest(viewport.width / 2, viewport.height / 2, Infinity);
const told = (i) => (i === null ? "" : `${shown.labels[i] ?? "without a label"}, ${shown.ids[i]}`);

function pointAt(i) {
  if (i === plane.pointed) return plane.changed();
  plane.pointed = i;
  const tip = $("map-tip");
  tip.hidden = i === null;
  plane.canvas.style.cursor = i === null ? "" : "pointer";
  if (i !== null) {
    const [x, y] = plane.place(i);
    const words = el("span", {}, el("b", { textContent: shown.labels[i] ?? "without a label" }), el("small", { textContent: shown.ids[i] }));
    tip.replaceChildren(thumbnail(shown.ids[i], ""), words);
    tip.classList.toggle("left", x > viewport.width / 2);
    tip.classList.toggle("above", y > viewport.height / 2);
    tip.style.left = `${x}px`;
    tip.style.top = `${y}px`;
  }
  return plane.changed();
}

const open = (i) => {
  if (i !== null) location.hash = `#/image/${shown.ids[i]}`;
};
