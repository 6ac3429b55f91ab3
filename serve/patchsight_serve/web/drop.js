// Files that a person brings: chosen, pasted or dropped, alone or in folders.

/** Files with `path`: where in a dropped or chosen folder each lay, or null. */
export const chosen = (files) => [...files].map((file) => withPath(file, file.webkitRelativePath));

/** The files of a drop; folders are gone through to their ends. */
export async function dropped({ items, files }) {
  const entries = [...items].map((item) => item.webkitGetAsEntry?.()); // now: the list is empty after the event
  if (!entries.some((entry) => entry?.isDirectory)) return chosen(files);
  const found = await Promise.all(entries.filter(Boolean).map((entry) => filesOf(entry)));
  return found.flat();
}

/** The name of the folder that a file lay in, or null. */
export const folderOf = (file) => file.path?.split("/").at(-2) ?? null;

async function filesOf(entry) {
  if (entry.name.startsWith(".")) return []; // what systems leave in folders
  const path = entry.fullPath.slice(1);
  const unread = () => Object.assign(new File([], entry.name), { unread: true }); // refused by its name
  if (entry.isFile) {
    const file = await new Promise((done) => entry.file(done, () => done(unread())));
    return [withPath(file, path)];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((done) => reader.readEntries(done, () => done(null))); // a hundred at a time
    if (!some) return [...found, withPath(unread(), path)];
    if (!some.length) return found;
    for (const inner of some) found.push(...(await filesOf(inner)));
  }
}

const withPath = (file, path) => Object.assign(file, { path: path?.includes("/") ? path : null });
