// Thumbnails on a map, in the place of points: which points get one, and what is drawn of them.

import { galleryName } from "./api.js";
import { thumbnail } from "./thumbnails.js";

const FEW = 150; // points on view, from which on down thumbnails appear
const MOST = 60; // at once
export const SIDE = 56; // pixels

export class Tiles {
  #pictures = new Map(); // id to an <img>
  #loaded;
  #gallery = galleryName(); // the page may be about another one by the time they are asked for

  /** loaded: called when a picture has come. */
  constructor(loaded) {
    this.#loaded = loaded;
  }

  /** Of points `{id, at}` on view those that get a thumbnail: none where there are too many, or it would lie over
   * another. */
  choose(points) {
    const taken = [];
    if (points.length > FEW) return taken;
    for (const point of points) {
      if (taken.length === MOST) break;
      if (taken.every(({ at }) => Math.max(Math.abs(at[0] - point.at[0]), Math.abs(at[1] - point.at[1])) > SIDE)) taken.push(point);
    }
    return taken;
  }

  has(id) {
    return Boolean(this.#pictures.get(id)?.naturalWidth);
  }

  /** Ask for the pictures of these points, and let go of all others. */
  fetch(points) {
    const wanted = new Set(points.map(({ id }) => id));
    for (const id of this.#pictures.keys()) if (!wanted.has(id)) this.#pictures.delete(id);
    for (const id of wanted) {
      if (this.#pictures.has(id)) continue;
      const picture = thumbnail(id, "", this.#gallery);
      picture.addEventListener("load", () => this.#pictures.has(id) && this.#loaded());
      this.#pictures.set(id, picture);
    }
  }

  /** Square, as the gallery shows it elsewhere. */
  draw(context, { id, at: [x, y] }) {
    const picture = this.#pictures.get(id);
    const { naturalWidth: w, naturalHeight: h } = picture;
    const part = Math.min(w, h);
    context.save();
    context.beginPath();
    context.roundRect(x - SIDE / 2, y - SIDE / 2, SIDE, SIDE, 5);
    context.clip();
    context.drawImage(picture, (w - part) / 2, (h - part) / 2, part, part, x - SIDE / 2, y - SIDE / 2, SIDE, SIDE);
    context.restore();
  }
}
