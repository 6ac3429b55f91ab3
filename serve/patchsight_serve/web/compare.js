// Two encoders side by side: where each looks, and how each orders the same neighbors. The second one stands in the
// page's address, as `beside=`.

import { $, el, plural } from "./elements.js";
import { complain } from "./messages.js";
import { orderBy, tilesOf } from "./order.js";
import { drawOn, embed, headChoices, headName, lengthOf } from "./picture.js";
import { app } from "./state.js";
import { addressed } from "./target.js";

/** The encoder that the address names to be compared with the chosen one, or null. */
export function second() {
  const named = addressed("beside");
  return app.encoders.find(({ name }) => name === named && name !== app.encoder.name) ?? null;
}

/** What is shown as both encoders see it; nothing where only one is asked for. */
export async function showCompare() {
  const { shown } = app;
  const encoders = [app.encoder, second()];
  $("view").classList.toggle("beside", Boolean(encoders[1]));
  $("compare").hidden = !encoders[1];
  if (!encoders[1]) for (const part of ["compare-looks", "compare-orders"]) $(part).replaceChildren();
  if (!encoders[1] || !shown) return;
  const current = () => shown === app.shown && encoders[0] === app.encoder && encoders[1] === second();
  $("compare").ariaBusy = "true";
  try {
    const seen = [shown, await embed(shown.bytes, encoders[1])];
    if (!current()) return;
    const looks = encoders.map((encoder, i) => lookOf(encoder, seen[i], `head-${i}`));
    $("compare-looks").replaceChildren(...looks);
    $("compare-orders").replaceChildren();
    $("compare-note").textContent = "Putting the neighbors into the second encoder's order…";
    const orders = await Promise.all(encoders.map((encoder, i) => orderBy(encoder, seen[i].embedding, shown.found)));
    if (current()) showOrders(encoders, orders);
  } catch (error) {
    if (current()) complain(error, showCompare);
  } finally {
    if (current()) $("compare").ariaBusy = "false";
  }
}

/** The picture with an encoder's attention, and its heads to choose from. */
function lookOf(encoder, { maps }, group) {
  const canvas = el("canvas", { role: "img" });
  const choices = el("div", { className: "head-choices" }, ...headChoices(group, maps, 0));
  const draw = () => {
    const head = Number(choices.querySelector("input:checked")?.value ?? 0);
    drawOn(canvas, maps[head], encoder);
    canvas.ariaLabel = maps.length ? `The picture with the attention of ${headName(head)} of ${encoder.name}` : "The picture";
  };
  choices.addEventListener("change", draw);
  draw();
  const { architecture, image_size } = encoder.manifest;
  const facts = `${architecture}; ${image_size} pixels, ${lengthOf(encoder.manifest)} numbers.`;
  return el(
    "article",
    {},
    el("h3", { textContent: encoder.name }),
    el("p", { className: "note", textContent: maps.length ? facts : `${facts} It has no attention to show.` }),
    el("div", { className: "frame" }, canvas),
    el("fieldset", { className: "heads", hidden: !maps.length }, el("legend", { textContent: "Attention of" }), choices),
  );
}

/** orders: of each encoder, [{id, label, score}], its nearest first. */
function showOrders(encoders, orders) {
  const { found } = app.shown;
  const places = new Map(orders[0].map(({ id }, place) => [id, place]));
  const moves = orders[1].map(({ id }, place) => places.get(id) - place);
  const lists = [tilesOf(orders[0]), tilesOf(orders[1], moves)].map((tiles, i) =>
    el("article", {}, el("h3", { textContent: `The order of ${encoders[i].name}` }), el("ol", { className: "neighbors" }, ...tiles)),
  );
  $("compare-orders").replaceChildren(...(orders[0].length ? lists : []));
  const still = moves.filter((move) => move === 0).length;
  const by = app.gallery.encoder?.name ?? app.encoder.name;
  $("compare-note").textContent = found.error
    ? found.error.message
    : orders[0].length
      ? `The ${plural(orders[0].length, "picture")} nearest to this one, as ${by} sees the gallery, in the order of each: ` +
        `${still || "none"} ${still === 1 ? "stands" : "stand"} at the same place, and an arrow says how far the others have moved.`
      : "There is no other picture in the gallery to put into an order.";
}

/** Pointing at a picture in one order shows it in the other, too. */
export function watchCompare() {
  const pair = ({ target }) => {
    const hash = target.closest?.("a")?.hash;
    for (const link of $("compare-orders").querySelectorAll("a")) link.classList.toggle("paired", link.hash === hash);
  };
  for (const event of ["pointerover", "focusin"]) $("compare-orders").addEventListener(event, pair);
}
