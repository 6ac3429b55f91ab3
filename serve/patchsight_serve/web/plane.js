// A canvas with a mark for each picture, and thumbnails in the place of marks where there is room. It draws what it is
// given; where the points come from, and what is said of them, is map.js's.

import { colorsOf, drawMark } from "./legend.js";
import { SIDE, Tiles } from "./tiles.js";

const MOVE_MS = 900; // from one layout to another
const REACH = 16; // pixels from the pointer to a point
const SETTLE_MS = 180; // of rest, before thumbnails are asked for

const still = matchMedia("(prefers-reduced-motion: reduce)");

export class Plane {
  ids = [];
  lit = null; // the class that stands out alone
  pointed = null; // the point that is told of
  current = null; // the id of the picture that was last shown
  reticle = false; // in the middle, for who comes by keyboard
  #of = new Uint8Array();
  #classes = [];
  #marks = []; // of each class: a small canvas, and a faint one
  #xs = new Float32Array();
  #ys = new Float32Array();
  #tiles = new Tiles(() => this.#redraw());
  #tiled = []; // the points that were drawn as thumbnails
  #frame = 0;
  #settling = 0;
  #moving = 0;

  constructor(canvas, viewport) {
    this.canvas = canvas;
    this.viewport = viewport;
    new ResizeObserver(() => this.#resize()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#paintMarks());
  }

  /** Other points; those of before that are among them move to their new places. */
  show(ids, { classes, of }, xs, ys) {
    const before = new Map(this.ids.map((id, i) => [id, [this.#xs[i], this.#ys[i]]]));
    const from = ids.map((id, i) => before.get(id) ?? [xs[i], ys[i]]);
    Object.assign(this, { ids, pointed: null });
    this.#of = of;
    this.#classes = classes;
    this.viewport.around(xs, ys);
    this.#move(from, xs, ys, before.size && !still.matches ? MOVE_MS : 0);
    this.#paintMarks();
  }

  #move(from, xs, ys, duration) {
    cancelAnimationFrame(this.#moving);
    const start = performance.now();
    const step = () => {
      const t = duration ? Math.min((performance.now() - start) / duration, 1) : 1;
      const eased = t * t * (3 - 2 * t);
      const between = (axis, to) => Float32Array.from(to, (end, i) => from[i][axis] + eased * (end - from[i][axis]));
      this.#xs = between(0, xs);
      this.#ys = between(1, ys);
      this.changed();
      if (t < 1) this.#moving = requestAnimationFrame(step);
    };
    step();
  }

  /** Draw with the next frame; where it stays so for a moment, look for thumbnails. */
  changed() {
    this.#redraw();
    clearTimeout(this.#settling);
    this.#settling = setTimeout(() => this.#settle(), SETTLE_MS);
  }

  /** The point nearest to a place on the screen, or null where none is within reach; a thumbnail reaches to its edge. */
  nearest(x, y, reach = REACH) {
    const over = this.#tiled.findLast(({ at }) => Math.max(Math.abs(at[0] - x), Math.abs(at[1] - y)) <= SIDE / 2);
    if (over) return over.i;
    let [best, distance] = [null, reach];
    for (let i = 0; i < this.ids.length; i++) {
      if (this.#isFaint(i)) continue;
      const [sx, sy] = this.place(i);
      const away = Math.hypot(sx - x, sy - y);
      if (away <= distance) [best, distance] = [i, away];
    }
    return best;
  }

  /** Where on the screen a point is. */
  place(i) {
    return this.viewport.toScreen(this.#xs[i], this.#ys[i]);
  }

  #isFaint(i) {
    return this.lit !== null && this.#of[i] !== this.lit;
  }

  /** The points on view, and a little beyond, as `{i, id, at}`. */
  #inView(beyond) {
    const { width, height } = this.viewport;
    const found = [];
    for (let i = 0; i < this.ids.length; i++) {
      const at = this.place(i);
      const inside = at[0] > -beyond && at[1] > -beyond && at[0] < width + beyond && at[1] < height + beyond;
      if (inside) found.push({ i, id: this.ids[i], at });
    }
    return found;
  }

  #chosen() {
    return this.#tiles.choose(this.#inView(0).filter(({ i }) => !this.#isFaint(i)));
  }

  #settle() {
    this.#tiles.fetch(this.#chosen());
    const { x, y, scale, zoom } = this.viewport;
    Object.assign(this.canvas.dataset, { x, y, scale, zoom }); // for whoever asks where it is, as tests do
  }

  #redraw() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #resize() {
    const { width, height } = this.canvas.getBoundingClientRect();
    if (!width) return; // another view is open
    this.canvas.width = Math.round(width * devicePixelRatio);
    this.canvas.height = Math.round(height * devicePixelRatio);
    this.viewport.resize(width, height);
    this.#paintMarks();
  }

  /** A mark is painted once, then copied: that is what makes twenty thousand of them quick. */
  #paintMarks() {
    const colors = colorsOf(this.#classes, this.canvas);
    const radius = this.ids.length > 5000 ? 2.5 : this.ids.length > 1000 ? 3.5 : 5;
    const side = 2 * Math.ceil(1.5 * radius);
    this.#marks = this.#classes.flatMap(({ rest }, i) => [1, 0.13].map((opacity) => {
      const mark = document.createElement("canvas");
      mark.width = mark.height = side * devicePixelRatio;
      const context = mark.getContext("2d");
      context.scale(devicePixelRatio, devicePixelRatio);
      context.globalAlpha = opacity;
      drawMark(context, i, rest, colors[i], side / 2, side / 2, radius);
      return { mark, side };
    }));
    this.changed();
  }

  #draw() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.viewport;
    const style = getComputedStyle(this.canvas);
    const [ink, accent, paper] = ["--ink", "--accent", "--paper"].map((name) => style.getPropertyValue(name).trim());
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, width, height);
    const seen = this.#inView(SIDE);
    for (const point of seen) if (this.#isFaint(point.i)) this.#drawMark(context, point, 1);
    for (const point of seen) if (!this.#isFaint(point.i)) this.#drawMark(context, point, 0);
    this.#tiled = this.#chosen().filter(({ id }) => this.#tiles.has(id));
    for (const point of this.#tiled) {
      this.#tiles.draw(context, point);
      const corner = point.at.map((middle) => middle + SIDE / 2 - 8);
      context.fillStyle = paper;
      context.beginPath();
      context.arc(...corner, 8, 0, 2 * Math.PI);
      context.fill();
      this.#drawMark(context, { i: point.i, at: corner }, 0);
    }
    const current = this.ids.indexOf(this.current);
    if (current >= 0) this.#drawRing(context, current, accent);
    if (this.pointed !== null) this.#drawRing(context, this.pointed, ink);
    if (!this.reticle) return;
    context.fillStyle = accent;
    context.fillRect(width / 2 - 9, height / 2 - 0.75, 18, 1.5);
    context.fillRect(width / 2 - 0.75, height / 2 - 9, 1.5, 18);
  }

  #drawMark(context, { i, at: [x, y] }, faint) {
    const { mark, side } = this.#marks[2 * this.#of[i] + faint];
    context.drawImage(mark, x - side / 2, y - side / 2, side, side);
  }

  #drawRing(context, i, color) {
    const [x, y] = this.place(i);
    Object.assign(context, { strokeStyle: color, lineWidth: 2.5 });
    context.beginPath();
    if (this.#tiled.some((point) => point.i === i)) context.roundRect(x - SIDE / 2 - 2, y - SIDE / 2 - 2, SIDE + 4, SIDE + 4, 6);
    else context.arc(x, y, 9, 0, 2 * Math.PI);
    context.stroke();
  }
}
