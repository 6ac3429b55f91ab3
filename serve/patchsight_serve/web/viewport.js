// Which part of a plane is on view. On the plane both axes have one scale and y grows upwards; on the screen, in CSS
// pixels, it grows downwards.

const MARGIN = 34; // pixels around the whole
const FARTHEST = 1; // the whole fits
const NEAREST = 400;

const within = (low, x, high) => Math.min(Math.max(x, low), high);

export class Viewport {
  #bounds = { left: 0, right: 1, bottom: 0, top: 1 };

  constructor() {
    this.width = this.height = 1;
    this.whole();
  }

  /** Pixels per unit of the plane. */
  get scale() {
    const { left, right, bottom, top } = this.#bounds;
    const across = Math.max(this.width - 2 * MARGIN, 1) / Math.max(right - left, 1e-9);
    const up = Math.max(this.height - 2 * MARGIN, 1) / Math.max(top - bottom, 1e-9);
    return this.zoom * Math.min(across, up, 1e6);
  }

  /** What there is to see: the whole of it fits at a zoom of 1. */
  around(xs, ys) {
    const [low, high] = [(a, b) => Math.min(a, b), (a, b) => Math.max(a, b)];
    this.#bounds = { left: xs.reduce(low), right: xs.reduce(high), bottom: ys.reduce(low), top: ys.reduce(high) };
    if (this.zoom === FARTHEST) this.whole();
    this.#stay();
  }

  resize(width, height) {
    Object.assign(this, { width, height });
  }

  whole() {
    const { left, right, bottom, top } = this.#bounds;
    Object.assign(this, { x: (left + right) / 2, y: (bottom + top) / 2, zoom: FARTHEST });
  }

  /** Closer by `factor` about a point of the screen, by default its middle; false at the end of the range. */
  zoomBy(factor, sx = this.width / 2, sy = this.height / 2) {
    const zoom = within(FARTHEST, this.zoom * factor, NEAREST);
    if (zoom === this.zoom) return false;
    const [x, y] = this.toPlane(sx, sy);
    this.zoom = zoom;
    const [nowX, nowY] = this.toPlane(sx, sy);
    this.x += x - nowX;
    this.y += y - nowY;
    if (zoom === FARTHEST) this.whole();
    this.#stay();
    return true;
  }

  /** What is seen moves by so many pixels. */
  panBy(dx, dy) {
    this.x -= dx / this.scale;
    this.y += dy / this.scale;
    this.#stay();
  }

  toScreen(x, y) {
    return [(x - this.x) * this.scale + this.width / 2, (this.y - y) * this.scale + this.height / 2];
  }

  toPlane(sx, sy) {
    return [this.x + (sx - this.width / 2) / this.scale, this.y - (sy - this.height / 2) / this.scale];
  }

  /** The middle never leaves what there is to see. */
  #stay() {
    this.x = within(this.#bounds.left, this.x, this.#bounds.right);
    this.y = within(this.#bounds.bottom, this.y, this.#bounds.top);
  }
}
