// What the modules of the page share.

export const app = {
  encoders: [],
  encoder: null, // its entry of /encoders
  galleries: [], // all there are: {name, count, encoder}
  gallery: { count: 0, encoder: null },
  images: [], // the first of the gallery, for samples and labels
  uploads: [], // {file, url, id}: id once it is in the gallery
  shown: null, // {target, bytes, bitmap, maps, …} as `open` made it; `chosen` once patches of it are
};
