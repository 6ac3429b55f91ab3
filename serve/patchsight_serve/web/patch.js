// The patches of the picture, to choose from: by pointer, or by keyboard. What is like the chosen ones is drawn on it.

import { closeAcross, offerAcross } from "./across.js";
import { $, place } from "./elements.js";
import { complain } from "./messages.js";
import { draw, squareOn } from "./picture.js";
import { gridOf, likeness, tokensOf } from "./similarity.js";
import { blockIn, blockOf, boxOf, inFrame, patchAt, patchesIn } from "./square.js";
import { app } from "./state.js";
import { settleAt, targetOf } from "./target.js";

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

let grid = null; // {h, w}, or null where there are no patches
let cursor = [0, 0]; // [column, row]
let anchor = null; // where a block begins that is being marked
let drags = false;

/** Lay the patches over the picture that is shown; those of the target's box are chosen. */
export function layPatches() {
  grid = gridOf(app.encoder);
  [anchor, drags] = [null, false];
  $("patches").hidden = !grid;
  closeAcross();
  if (!grid) return;
  cursor = [Math.floor(grid.w / 2), Math.floor(grid.h / 2)];
  const { width, height } = $("picture");
  place($("patches"), inFrame(squareOn(app.shown.bitmap), width, height));
  mark($("patch-chosen"), null);
  mark($("patch-cursor"), document.activeElement === $("patches") ? blockOf(cursor, cursor) : null);
  chooseIn(app.shown.target.box);
}

/** Choose the patches in a box of the picture that is shown, as the address has it; null: none. */
export function chooseIn(box) {
  const { chosen, target } = app.shown;
  if (!grid || String(box) === String(chosen ? target.box : null)) return null;
  return box ? choose(blockIn(box, grid, squareOn(app.shown.bitmap))) : leave();
}

export function watchPatches() {
  const patches = $("patches");
  patches.addEventListener("pointerdown", (event) => {
    if (!event.isPrimary || event.button) return;
    patches.setPointerCapture(event.pointerId);
    [cursor, drags] = [under(event), true];
    anchor = cursor;
    mark($("patch-cursor"), marked());
  });
  patches.addEventListener("pointermove", (event) => {
    cursor = under(event);
    mark($("patch-cursor"), marked());
  });
  patches.addEventListener("pointerup", () => drags && choose(marked()));
  patches.addEventListener("pointercancel", rest); // the finger scrolls the page
  patches.addEventListener("pointerleave", rest);
  patches.addEventListener("focus", () => mark($("patch-cursor"), marked()));
  patches.addEventListener("blur", rest);
  patches.addEventListener("keydown", onKey);
  $("patch-back").addEventListener("click", leaveByHand);
}

const marked = () => blockOf(anchor ?? cursor, cursor);

/** No block is being marked any more. */
function rest() {
  [anchor, drags] = [null, false];
  if (document.activeElement !== $("patches")) mark($("patch-cursor"), null);
}

function under({ clientX, clientY }) {
  const { left, top, width, height } = $("patches").getBoundingClientRect();
  return patchAt((clientX - left) / width, (clientY - top) / height, grid);
}

function onKey(event) {
  if (event.key in MOVES) {
    const [across, down] = MOVES[event.key];
    anchor = event.shiftKey ? (anchor ?? cursor) : null;
    cursor = patchAt((cursor[0] + across + 0.5) / grid.w, (cursor[1] + down + 0.5) / grid.h, grid);
    mark($("patch-cursor"), marked());
    tell();
  } else if (event.key === "Enter" || event.key === " ") choose(marked());
  else if (event.key === "Escape" && app.shown.chosen) leaveByHand();
  else return;
  event.preventDefault();
}

/** Say where the cursor is, and how alike that is. */
function tell() {
  const [column, row] = cursor;
  const alike = app.shown.chosen?.map.values[row * grid.w + column];
  const how = alike === undefined ? "" : `: ${alike.toFixed(2)}`;
  $("status").textContent = `Row ${row + 1}, column ${column + 1}${how}`;
}

async function choose(block) {
  const { shown } = app;
  rest();
  mark($("patch-chosen"), block);
  closeAcross();
  try {
    shown.tokens ??= tokensOf(shown.bytes);
    const tokens = await shown.tokens;
    if (shown !== app.shown) return;
    shown.chosen = { block, grid, map: likeness(tokens, block) };
    shown.target.box = boxOf(block, grid, squareOn(shown.bitmap));
    if (targetOf(location.hash)?.key === shown.target.key) settleAt(shown.target); // else another view is open by now
    draw();
    offerAcross();
    const count = patchesIn(block, grid).length;
    $("status").textContent = `Chosen: ${count === 1 ? "one patch" : `${count} patches`}. What is like it is bright.`;
  } catch (error) {
    shown.tokens = null; // the next click asks again
    if (shown !== app.shown) return;
    mark($("patch-chosen"), shown.chosen?.block ?? null);
    complain(error, () => choose(block));
  }
}

/** Back to the attention. */
function leave() {
  app.shown.chosen = app.shown.target.box = null;
  settleAt(app.shown.target);
  closeAcross();
  mark($("patch-chosen"), null);
  draw();
}

function leaveByHand() {
  leave();
  $("patches").focus();
}

/** Put a frame around a block; null: none. */
function mark(frame, block) {
  frame.hidden = !block;
  if (!block) return;
  const { left, top, right, bottom } = block;
  place(frame, { left: left / grid.w, top: top / grid.h, width: (right - left) / grid.w, height: (bottom - top) / grid.h });
}
