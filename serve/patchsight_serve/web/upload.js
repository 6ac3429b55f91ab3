// A picture of the person's own on its way into the gallery.

import { callJson, galleryName, ofGallery, posting } from "./api.js";
import { app } from "./state.js";

/**
 * Put it into the gallery that the page is about now: its id there, and whether it was `created`, or there already.
 * about: its label and metadata, without those that are empty. options: of `call`, as are the errors.
 */
export async function keep(upload, about, options = {}) {
  const gallery = galleryName();
  const said = Object.entries(about).filter(([, value]) => value);
  const query = { ...Object.fromEntries(said), ...(app.gallery.encoder ? {} : { encoder: app.encoder.name }) };
  const { results } = await callJson(ofGallery("gallery/images", query), { ...posting(upload.file), ...options });
  if (gallery === galleryName()) upload.id = results[0].id;
  return results[0];
}
