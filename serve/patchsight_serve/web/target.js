// What an address names: #/image/ID is a picture of the gallery, #/upload/N one of the person's own; behind them may
// stand ?box=, the part of it whose patches are chosen. What stands in front of the # is kept on the way: ?encoder= that
// is chosen, ?beside= the one that it is compared with, ?gallery=.

import { call, ofGallery } from "./api.js";
import { app } from "./state.js";

const LARGE = 2 ** 21; // bytes

/** A target: `{key, box, upload}`, `{key, box, id}`, or null. box: left, top, right, bottom as fractions, or null. */
export function targetOf(hash) {
  const [, key, kind, name, edges] = hash.match(/^(#\/(image|upload)\/([\w.-]+))(?:\?box=((?:[\d.]+,){3}[\d.]+))?$/) ?? [];
  const box = edges?.split(",").map(Number) ?? null;
  if (kind === "image") return { key, box, id: name };
  return kind === "upload" && app.uploads[name]?.url ? { key, box, upload: app.uploads[name] } : null;
}

/** Have the address name a target. */
export function settleAt({ key, box }) {
  const hash = box ? `${key}?box=${box.map((edge) => Number(edge.toFixed(4)))}` : key;
  if (location.hash !== hash) history.replaceState(null, "", hash);
}

/** What the address says in front of the #, under this name; null without. */
export const addressed = (name) => new URLSearchParams(location.search).get(name);

/** Have the address say that; null: nothing under this name. The page stays as it is. */
export function address(name, value) {
  const url = new URL(location.href);
  if (value === null) url.searchParams.delete(name);
  else url.searchParams.set(name, value);
  history.replaceState(null, "", url);
}

/** The upload that became the gallery's image of this id, if it was one. */
export const ownOf = (id) => app.uploads.find((upload) => upload.id === id);

export const nameOf = ({ upload, id }) => (upload ?? ownOf(id))?.file.name ?? id;

/** The bytes to encode: the person's own file where there is one, else what the gallery was given. */
export async function bytesOf({ upload, id }) {
  const own = upload ?? ownOf(id);
  if (own) return own.file;
  return partOf(id, "image").catch((error) => {
    if (error.status === 404) return partOf(id, "thumbnail"); // this server keeps no originals
    throw error;
  });
}

/** A picture of the gallery to embed beside others in one request: a large one as its thumbnail. */
export async function pictureOf(id) {
  const bytes = await bytesOf({ id });
  return bytes.size > LARGE ? partOf(id, "thumbnail") : bytes;
}

/** A bitmap to show. The server reads formats that a browser does not: then the thumbnail's, or null without one. */
export async function bitmapOf({ id }, bytes) {
  const bitmap = await createImageBitmap(bytes).catch(() => null);
  if (bitmap || !id) return bitmap;
  return partOf(id, "thumbnail").then(createImageBitmap).catch(() => null);
}

const partOf = async (id, part) => (await call(ofGallery(`gallery/images/${encodeURIComponent(id)}/${part}`))).blob();
