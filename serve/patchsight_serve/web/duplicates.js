// Pictures of the gallery that are nearly the same; of those that are just the same, the copies can go.

import { call, callJson, ofGallery } from "./api.js";
import { confirmed } from "./confirm.js";
import { el, plural } from "./elements.js";
import { readGallery } from "./gallery.js";
import { complain } from "./messages.js";
import { part } from "./part.js";
import { tile } from "./thumbnails.js";

const SHOWN = 50; // groups
const MEMBERS = 24; // of each
const ALL = 1000; // what the server gives at once

export const duplicates = () =>
  part({
    title: "What is there more than once",
    about: "Pictures that are alike from this similarity on, and others that those are like. 1 is the same to the encoder.",
    name: "Similarity",
    input: { min: 0.8, max: 1, step: 0.01, value: 0.95 },
    text: (score) => Number(score).toFixed(2),
    show,
  });

async function show(score, again) {
  const { total, images, groups } = await ask(score, { limit: SHOWN, members: MEMBERS });
  const copies = groups.some(({ members }) => members.some((image) => image.copy_of));
  const rest = total > groups.length ? ` These are the largest ${groups.length}.` : "";
  const text = total ? `${plural(total, "group")} among ${plural(images, "picture")}.${rest}` : `None of ${plural(images, "picture")} is like another.`;
  const button = el("button", { type: "button", className: "quiet", textContent: "Remove the copies…", onclick: () => removeCopies(score, button, again) });
  return { note: copies ? [`${text} `, button] : [text], items: groups.map(item) };
}

function item({ size, members }) {
  const title = el("h3", { textContent: plural(size, "picture") });
  const more = size > members.length ? el("p", { className: "note", textContent: `and ${size - members.length} more` }) : "";
  return el("li", {}, title, el("ol", { className: "neighbors" }, ...members.map(member)), more);
}

function member(image) {
  const one = tile(image);
  if (image.copy_of) one.append(el("p", { className: "copy", textContent: `copy of ${image.copy_of}` }));
  return one;
}

const ask = (score, query) => callJson(ofGallery("gallery/duplicates", { min_score: score, ...query }));

/** All ids that have just the bytes of another one, which stays. */
async function copiesFrom(score) {
  const ids = [];
  for (let cursor = ""; cursor !== null; ) {
    const page = await ask(score, { limit: ALL, members: ALL, cursor });
    ids.push(...page.groups.flatMap(({ members }) => members.filter((image) => image.copy_of).map(({ id }) => id)));
    cursor = page.next_cursor;
  }
  return ids;
}

async function removeCopies(score, button, again) {
  try {
    const ids = await copiesFrom(score);
    const title = `Remove ${ids.length === 1 ? "1 copy" : `${ids.length} copies`}?`;
    const text = "Each has byte for byte what another picture of the gallery has. That one stays, with its label.";
    if (!(await confirmed(title, text, `Remove ${ids.length}`))) return;
    button.disabled = true;
    for (const [i, id] of ids.entries()) {
      button.textContent = `Removed ${i} of ${ids.length}`;
      await call(ofGallery(`gallery/images/${encodeURIComponent(id)}`), { method: "DELETE" });
    }
    await readGallery();
    await again();
  } catch (error) {
    complain(error, again);
  }
}
