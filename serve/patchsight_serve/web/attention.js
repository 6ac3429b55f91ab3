// Attention maps and embeddings as pictures. Maps are {h, w, values}, values row by row.

const SMOOTH = 256; // pixels of a smooth layer's longer side, about
const LONGEST = 960; // pixels of the picture's longer side, at most
const OUTSIDE = 0.3; // opacity of what the encoder's crop leaves out

/** The colors of the server's own /attention: dark violet over red to light yellow, evenly in lightness (OKLab). */
const COLORS = Array.from({ length: 256 }, (_, i) => {
  const t = i / 255;
  const hue = ((290 + 175 * t) * Math.PI) / 180;
  const chroma = 0.03 + 0.17 * Math.sin(Math.PI * t) ** 0.8 * (1 - 0.25 * t);
  return oklab(0.2 + 0.75 * t, chroma * Math.cos(hue), chroma * Math.sin(hue));
});

function oklab(L, a, b) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((x) => {
    const linear = Math.min(Math.max(x, 0), 1);
    return 255 * (linear <= 0.0031308 ? 12.92 * linear : 1.055 * linear ** (1 / 2.4) - 0.055);
  });
}

/** The attention of a reply, packed as (heads, h, w), to one map per head. */
export function unpackHeads({ shape: [heads, h, w], data }) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const all = new Float32Array(bytes.buffer);
  return Array.from({ length: heads }, (_, i) => ({ h, w, values: all.subarray(i * h * w, (i + 1) * h * w) }));
}

/** The mean of several maps. */
export function mean(maps) {
  const { h, w } = maps[0];
  return { h, w, values: maps[0].values.map((_, i) => maps.reduce((sum, map) => sum + map.values[i], 0) / maps.length) };
}

/** Paint a map into a canvas, one pixel per patch, or smoothly; the weakest is darkest, the strongest brightest. */
export function paint(canvas, map, smooth = false) {
  const low = map.values.reduce((a, b) => Math.min(a, b));
  const span = map.values.reduce((a, b) => Math.max(a, b)) - low || 1;
  const { h, w, values } = smooth ? enlarge(map) : map;
  canvas.width = w;
  canvas.height = h;
  const image = new ImageData(w, h);
  values.forEach((value, i) => {
    const step = Math.round(255 * Math.min(Math.max((value - low) / span, 0), 1));
    image.data.set([...COLORS[step], 255], 4 * i);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** A map with many values per patch, bicubic, like the server's. */
function enlarge({ h, w, values }) {
  const fine = Math.max(2, Math.min(16, Math.round(SMOOTH / Math.max(h, w))));
  const wide = resample(values, h, w, fine);
  const turned = resample(transpose(wide, h, w * fine), w * fine, h, fine);
  return { h: h * fine, w: w * fine, values: transpose(turned, w * fine, h * fine) };
}

/** Each of `rows` rows of `n` values to `n * fine` values, by Catmull-Rom's cubic; the edges repeat. */
function resample(values, rows, n, fine) {
  const out = new Float32Array(rows * n * fine);
  for (let x = 0; x < n * fine; x++) {
    const at = (x + 0.5) / fine - 0.5;
    const left = Math.floor(at);
    const t = at - left;
    const weights = [
      ((-t + 2) * t - 1) * t * 0.5,
      ((3 * t - 5) * t * t + 2) * 0.5,
      ((-3 * t + 4) * t + 1) * t * 0.5,
      (t - 1) * t * t * 0.5,
    ];
    weights.forEach((weight, i) => {
      const column = Math.min(Math.max(left - 1 + i, 0), n - 1);
      for (let y = 0; y < rows; y++) out[y * n * fine + x] += weight * values[y * n + column];
    });
  }
  return out;
}

function transpose(values, h, w) {
  const out = new Float32Array(h * w);
  for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) out[x * h + y] = values[y * w + x];
  return out;
}

/**
 * Draw a picture with a painted map over the central square that the encoder sees; the rest is faint.
 * picture: ImageBitmap, or null where the browser cannot read the format. square: in fractions of it.
 * layer: a painted canvas, or null; smooth: without edges between its pixels.
 */
export function compose(canvas, picture, square, { layer, opacity, smooth }) {
  const scale = picture ? LONGEST / Math.max(picture.width, picture.height) : 1;
  const [width, height] = picture ? [picture.width * scale, picture.height * scale].map(Math.round) : [LONGEST, LONGEST];
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const draw = (alpha) => {
    context.globalAlpha = alpha;
    context.fillStyle = picture ? "#fff" : "#777"; // what is transparent is white to the encoder
    context.fillRect(0, 0, width, height);
    if (picture) context.drawImage(picture, 0, 0, width, height);
  };
  context.imageSmoothingQuality = "high";
  draw(OUTSIDE);
  const place = [square.left * width, square.top * height, square.width * width, square.height * height];
  context.beginPath();
  context.rect(...place);
  context.clip();
  context.clearRect(0, 0, width, height);
  draw(1);
  if (!layer) return;
  context.globalAlpha = opacity;
  context.imageSmoothingEnabled = smooth;
  context.drawImage(layer, ...place);
}
