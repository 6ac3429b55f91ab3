// What the gallery says of a picture that is in it: its label, which can be changed, and whether it stays.

import { call, callJson, ofGallery } from "./api.js";
import { confirmed } from "./confirm.js";
import { $ } from "./elements.js";
import { complain } from "./messages.js";
import { app } from "./state.js";
import { ownOf } from "./target.js";

const pathOf = (id) => ofGallery(`gallery/images/${encodeURIComponent(id)}`);

/** image: as the gallery tells of it, or null where the picture is not in it. */
export function showEntry(image) {
  $("entry").hidden = !image;
  if (image) $("entry-label").value = image.label ?? "";
}

/** changed: done after the gallery is another one; told whether the picture that is shown has left it. */
export function onEntryChanged(changed) {
  $("entry").addEventListener("submit", async (event) => {
    event.preventDefault();
    const body = JSON.stringify({ label: $("entry-label").value.trim() || null });
    try {
      await callJson(pathOf(app.shown.target.id), { method: "PATCH", body, type: "application/json" });
      await changed(false);
    } catch (error) {
      complain(error, () => $("entry").requestSubmit());
    }
  });
  $("entry-remove").addEventListener("click", async () => {
    const { id } = app.shown.target;
    if (!(await confirmed("Remove this picture?", `${id} will be gone from the gallery for good.`, "Remove it"))) return;
    try {
      await call(pathOf(id), { method: "DELETE" });
      const own = ownOf(id);
      if (own) own.id = null;
      await changed(true);
    } catch (error) {
      complain(error, () => $("entry-remove").click());
    }
  });
}
