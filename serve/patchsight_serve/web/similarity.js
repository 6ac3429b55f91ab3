// How alike the patches of a picture are to the encoder: cosines of their tokens, made here.

import { call, posting } from "./api.js";
import { app } from "./state.js";
import { patchesIn } from "./square.js";

/** The grid of patches {h, w} that an encoder parts its square into, or null where it has no patch tokens. */
export function gridOf({ outputs }) {
  const [h, w] = outputs.patch_tokens ?? [];
  return h ? { h, w } : null;
}

/** The tokens of a picture's patches at length 1: {h, w, D, values}, patch by patch, row by row. Throws what `call` does. */
export async function tokensOf(bytes, signal) {
  const query = new URLSearchParams({ encoder: app.encoder.name, outputs: "patch_tokens" });
  const reply = await call(`embed?${query}`, { ...posting(bytes), accept: "application/octet-stream", signal });
  const [, h, w, D] = reply.headers.get("X-Shape").split(",").map(Number);
  const values = new Float32Array(await reply.arrayBuffer());
  for (let start = 0; start < values.length; start += D) toUnitLength(values.subarray(start, start + D));
  return { h, w, D, values };
}

/** In place; zeros stay. */
export function toUnitLength(vector) {
  const length = Math.hypot(...vector);
  if (length) vector.forEach((value, i) => (vector[i] = value / length));
  return vector;
}

export function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

/** A map of each patch's cosine, -1 to 1, to the patch of a block that it is most alike. */
export function likeness({ h, w, D, values }, block) {
  const token = (i) => values.subarray(i * D, (i + 1) * D);
  const chosen = patchesIn(block, { w }).map(token);
  return { h, w, values: Float32Array.from({ length: h * w }, (_, i) => Math.max(...chosen.map((one) => dot(one, token(i))))) };
}
