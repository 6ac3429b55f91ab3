// The square in the middle of a picture, which is what an encoder sees of it, and the patches that it is parted into.
//
// A block of patches is {left, top, right, bottom} in patches, right and bottom behind the last one.

/** The square as fractions of a picture's width and height: {left, top, width, height}. transform: of a manifest. */
export function squareOf(width, height, { crop, resize }) {
  const side = (Math.min(width, height) * crop) / resize;
  return { left: (1 - side / width) / 2, top: (1 - side / height) / 2, width: side / width, height: side / height };
}

/** A box, as fractions of a picture, as fractions of a square frame that holds the picture whole, in its middle. */
export function inFrame({ left, top, width, height }, pictureWidth, pictureHeight) {
  const [wide, high] = [pictureWidth, pictureHeight].map((side) => side / Math.max(pictureWidth, pictureHeight));
  return { left: (1 - wide) / 2 + left * wide, top: (1 - high) / 2 + top * high, width: width * wide, height: height * high };
}

/** The patch at a place, 0 to 1 across the square: [column, row]; the nearest one where the place is outside. */
export function patchAt(x, y, { h, w }) {
  const within = (at, n) => Math.min(Math.max(Math.floor(at * n), 0), n - 1);
  return [within(x, w), within(y, h)];
}

/** The block from one patch to another, both [column, row]. */
export function blockOf([x0, y0], [x1, y1]) {
  const [left, right] = [Math.min(x0, x1), Math.max(x0, x1) + 1];
  return { left, right, top: Math.min(y0, y1), bottom: Math.max(y0, y1) + 1 };
}

/** A block as the server wants a region: left, top, right, bottom as fractions of the picture, 0 to 1. */
export function boxOf({ left, top, right, bottom }, { h, w }, square) {
  const across = [left / w, right / w].map((x) => square.left + x * square.width);
  const down = [top / h, bottom / h].map((y) => square.top + y * square.height);
  return [across[0], down[0], across[1], down[1]].map((edge) => Math.min(Math.max(edge, 0), 1));
}

/** The block that such a region covers, of one patch at least. */
export function blockIn([left, top, right, bottom], { h, w }, square) {
  const edge = (share, n, least, most) => Math.min(Math.max(Math.round(share * n) || 0, least), most);
  const [x0, x1] = [left, right].map((x) => (x - square.left) / square.width);
  const [y0, y1] = [top, bottom].map((y) => (y - square.top) / square.height);
  const first = { left: edge(x0, w, 0, w - 1), top: edge(y0, h, 0, h - 1) };
  return { ...first, right: edge(x1, w, first.left + 1, w), bottom: edge(y1, h, first.top + 1, h) };
}

/** The numbers of a block's patches, row by row from the top left of the grid. */
export function patchesIn({ left, top, right, bottom }, { w }) {
  const found = [];
  for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) found.push(y * w + x);
  return found;
}
