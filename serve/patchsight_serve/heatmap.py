"""An attention map laid over its picture, as a PNG; and DINO's thresholding, the patches that hold most of the mass."""

import io

import numpy as np
from PIL import Image

from patchsight_serve.decode import fit
from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.manifest import Transform

SHOWN_SIDE = 448  # pixels, about: a multiple of the map's side, so that a patch's edges fall on pixels


def _perceptual_colors(steps: int = 256) -> Pixels:
    """uint8 `(steps, 3)`: from dark violet over red to light yellow, along a straight line of lightness in OKLab.

    The same step of attention looks like the same step of color everywhere, also in print and to the color-blind.
    """
    t = np.linspace(0.0, 1.0, steps)
    L, hue = 0.2 + 0.75 * t, np.radians(290.0 + 175.0 * t)
    chroma = 0.03 + 0.17 * np.sin(np.pi * t) ** 0.8 * (1 - 0.25 * t)
    lab = np.stack([L, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    # OKLab to linear sRGB: Björn Ottosson, https://bottosson.github.io/posts/oklab
    lms = lab @ np.array(
        [[1.0, 1.0, 1.0], [0.3963377774, -0.1055613458, -0.0894841775], [0.2158037573, -0.0638541728, -1.2914855480]]
    )
    linear = lms**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = np.clip(linear, 0.0, 1.0)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    colors: Pixels = (255.0 * srgb + 0.5).astype(np.uint8)
    return colors


COLORS = _perceptual_colors()


def keep_mass(attention: Values, mass: float) -> Values:
    """The fewest, strongest patches that together hold at least `mass` of the map's sum; the others become 0.

    attention: `(h, w)`, not negative. mass: 0 < mass <= 1.
    """
    flat = attention.ravel()
    order = np.argsort(-flat, kind="stable")
    share = np.cumsum(flat[order], dtype=np.float64) / max(float(flat.sum(dtype=np.float64)), 1e-12)
    count = int(np.searchsorted(share, mass - 1e-6)) + 1
    kept = np.zeros_like(flat)
    kept[order[:count]] = flat[order[:count]]
    return kept.reshape(attention.shape)


def shown_crop(picture: Image.Image, transform: Transform, grid: int) -> Pixels:
    """The part of the picture that the encoder sees, from its full size: uint8 `(S, S, 3)`, S a multiple of `grid`."""
    side = grid * max(1, round(SHOWN_SIDE / grid))
    resize = -(-transform.resize * side // transform.crop)
    return fit(picture, Transform(resize=resize, crop=side, filter=transform.filter))


def overlay(picture: Pixels, attention: Values, thresholded: bool = False) -> bytes:
    """PNG of the picture `(S, S, 3)` with the map `(h, w)` over it.

    The weakest patch has the darkest color and the strongest the brightest, however little they differ. `thresholded`:
    patches of attention 0 were cut away; they show the picture in gray, with hard edges.
    """
    S = len(picture)
    low, high = float(attention.min()), float(attention.max())
    value = (attention - low) / max(high - low, 1e-12)
    smooth = Image.fromarray(value.astype(np.float32)).resize((S, S), Image.Resampling.BICUBIC)
    heat = np.clip(np.asarray(smooth), 0.0, 1.0)[..., None]  # (S, S, 1), 0..1
    colors = COLORS[(255.0 * heat[..., 0]).astype(np.uint8)].astype(np.float32)
    opacity = 0.55 - 0.1 * heat
    blended = picture * (1.0 - opacity) + colors * opacity
    if thresholded:
        patch = S // len(attention)
        kept = np.kron(attention > 0, np.ones((patch, patch), bool))[..., None]
        gray = picture.mean(axis=2, keepdims=True) * 0.45
        blended = np.where(kept, blended, gray)
    file = io.BytesIO()
    Image.fromarray(blended.round().astype(np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()
