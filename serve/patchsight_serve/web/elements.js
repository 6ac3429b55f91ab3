// Elements of the page, made and found; and numbers as text.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings become text, never HTML. */
export function el(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

/** box: {left, top, width, height}, fractions of what the node lies in. */
export function place(node, box) {
  for (const [side, share] of Object.entries(box)) node.style[side] = `${100 * share}%`;
}

export const plural = (n, one) => `${n.toLocaleString("en")} ${one}${n === 1 ? "" : "s"}`;
export const percent = (x, digits = 0) => `${(100 * x).toFixed(digits)} %`;

export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

/** What `call` measured, as text. */
export function timeOf({ all, ...stages }) {
  const parts = Object.entries(stages).map(([stage, ms]) => `${stage} ${ms.toFixed(1)} ms`);
  return [...parts, `answered in ${all.toFixed(0)} ms`].join(" · ");
}
