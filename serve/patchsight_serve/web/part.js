// A part of the view of groups: a slider, what it asks for, and the list that comes of it.

import { el } from "./elements.js";
import { complain } from "./messages.js";

/**
 * `{section, fill}`: the element, and what fills it. input: properties of the slider. show: told the slider's value,
 * gives the note and the elements of the list. Of two answers the one that was asked for last is shown.
 */
export function part({ title, about, name, input, text, show }) {
  const slider = el("input", { type: "range", ...input });
  const value = el("span", { textContent: text(slider.value) });
  const note = el("p", { className: "note" });
  note.role = "status";
  const list = el("ol", { className: "group-list" });
  const heading = el("h2", { textContent: title });
  const choice = el("label", { className: "slider" }, `${name} `, slider, value);
  const section = el("section", {}, heading, el("p", { className: "note", textContent: about }), choice, note, list);
  let turn = 0;

  async function fill() {
    const mine = ++turn;
    note.textContent = "Being worked out…";
    const shown = await show(Number(slider.value), () => fill().catch((error) => complain(error, fill)));
    if (mine !== turn) return;
    note.replaceChildren(...shown.note);
    list.replaceChildren(...shown.items);
  }

  slider.addEventListener("input", () => (value.textContent = text(slider.value)));
  slider.addEventListener("change", () => fill().catch((error) => complain(error, fill)));
  return { section, fill };
}
