// The labels of a map: which color and shape each has, how many pictures, and which one stands out alone.

import { el } from "./elements.js";

const MOST = 10; // labels with a color of their own
const SHAPES = [circle, square, triangle, diamond, cross]; // who sees no difference of color sees one of shape

/** What the labels are: `classes` as `[{name, count, rest}]`, the most frequent first, and the class `of` each. */
export function classify(labels) {
  const counts = new Map();
  for (const label of labels) if (label !== null) counts.set(label, (counts.get(label) ?? 0) + 1);
  const ranked = [...counts].sort(([a, m], [b, n]) => n - m || (a < b ? -1 : 1));
  const classes = ranked.slice(0, MOST).map(([name, count]) => ({ name, count }));
  const place = new Map(classes.map(({ name }, i) => [name, i]));
  const of = Uint8Array.from(labels, (label) => place.get(label) ?? classes.length);
  const rest = of.reduce((sum, i) => sum + (i === classes.length), 0);
  const others = ranked.length - classes.length;
  const name = others ? `${others} other label${others > 1 ? "s" : ""}, or none` : "without a label";
  if (rest) classes.push({ name, count: rest, rest: true });
  return { classes, of };
}

/** The colors of so many classes, as the style sheet has them for light or dark. */
export function colorsOf(classes, element) {
  const style = getComputedStyle(element);
  return classes.map(({ rest }, i) => style.getPropertyValue(rest ? "--mark-rest" : `--mark-${i}`).trim());
}

/** Draw the mark of a class around a point. */
export function drawMark(context, i, rest, color, x, y, radius) {
  context.fillStyle = color;
  context.beginPath();
  if (rest) circle(context, x, y, 0.8 * radius);
  else SHAPES[i % SHAPES.length](context, x, y, radius);
  context.fill();
}

function circle(context, x, y, r) {
  context.arc(x, y, r, 0, 2 * Math.PI);
}

function square(context, x, y, r) {
  context.rect(x - 0.85 * r, y - 0.85 * r, 1.7 * r, 1.7 * r);
}

function triangle(context, x, y, r) {
  polygon(context, [[x, y - 1.15 * r], [x + 1.1 * r, y + 0.8 * r], [x - 1.1 * r, y + 0.8 * r]]);
}

function diamond(context, x, y, r) {
  polygon(context, [[x, y - 1.25 * r], [x + 1.25 * r, y], [x, y + 1.25 * r], [x - 1.25 * r, y]]);
}

function cross(context, x, y, r) {
  context.rect(x - 1.15 * r, y - 0.42 * r, 2.3 * r, 0.84 * r);
  context.rect(x - 0.42 * r, y - 1.15 * r, 0.84 * r, 2.3 * r);
}

function polygon(context, [first, ...others]) {
  context.moveTo(...first);
  for (const corner of others) context.lineTo(...corner);
  context.closePath();
}

/** Fill a list with a button for each class; `choose(i)` has it stand out, `choose(null)` none. lit: which one does. */
export function showLegend(list, classes, colors, lit, choose) {
  const ratio = devicePixelRatio;
  const pick = (i) => {
    lit = i === lit ? null : i;
    for (const [n, button] of list.querySelectorAll("button").entries()) button.ariaPressed = String(n === lit);
    choose(lit);
  };
  const entries = classes.map(({ name, count, rest }, i) => {
    const mark = el("canvas", { width: 14 * ratio, height: 14 * ratio, ariaHidden: "true" });
    const context = mark.getContext("2d");
    context.scale(ratio, ratio);
    drawMark(context, i, rest, colors[i], 7, 7, 4.5);
    const button = el("button", { type: "button", ariaPressed: String(i === lit) }, mark);
    button.append(el("span", { textContent: name }), el("small", { textContent: count.toLocaleString("en") }));
    button.addEventListener("click", () => pick(i));
    return el("li", {}, button);
  });
  list.replaceChildren(...entries);
}
