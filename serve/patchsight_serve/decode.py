"""The one decoder: encoded image bytes to the uint8 array an encoder takes, for training, export, index and server.

The header is read first, and an image over a limit is refused before a single pixel is decoded. What is not plain
8-bit RGB is brought there like this: EXIF orientation is applied; an animated file gives its first frame; CMYK and
YCCK are converted without a color profile; 16-bit and 32-bit gray are scaled linearly from 0..65535 (float gray from
its own range); transparency is laid over white; gray and palette become RGB. Metadata that cannot be read is ignored.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from patchsight_serve.errors import DamagedImage, InvalidRequest, TooLarge, UnsupportedImage
from patchsight_serve.manifest import Transform

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
# What Pillow's readers raise on broken files. Anything else is a bug, and must not be taken for a bad image.
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error,
    OverflowError, ZeroDivisionError, AttributeError, RuntimeError, NotImplementedError, MemoryError,
)  # fmt: skip
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation to what undoes it

# Both settings belong to the process, and are made once here because neither can be made for one thread alone.
# `Limits` is checked against the header before any pixel is decoded, so Pillow's own limit, which warns first and
# raises later, has nothing left to do.
Image.MAX_IMAGE_PIXELS = None
# Pillow warns about metadata it cannot read, with the values in the text: a client who varies them would fill the log,
# and Python's record of warnings already shown. The pixels decide whether an image is good.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True)
class Limits:
    """What one image may cost. Pixels are counted in the header, over all of width × height."""

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 50_000_000
    max_side: int = 65_500


def _begins_like_ours(data: bytes) -> bool:
    """The first bytes are those of a format we read, so that what follows is damaged, not foreign."""
    return data.startswith(_MAGIC) or (data[:4], data[8:12]) == (b"RIFF", b"WEBP") or data[4:12] == b"ftypavif"


def _heif_formats() -> tuple[str, ...]:
    """HEIC is read where the extra `heif` is installed."""
    try:
        import pillow_heif
    except ImportError:
        return ()
    pillow_heif.register_heif_opener()
    return ("HEIF",)


_HEIF = _heif_formats()


def _open(data: bytes, limits: Limits) -> Image.Image:
    """Read the header alone. Raises the four image errors of `decode`."""
    if not data:
        raise InvalidRequest("the image is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise TooLarge(f"the image has {len(data):,} bytes, the limit is {limits.max_bytes:,}")
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and not _HEIF:
        raise UnsupportedImage("this is a HEIC image; the server reads them with the extra `patchsight[heif]`")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS + _HEIF)
    except UnidentifiedImageError:
        if _begins_like_ours(data):
            raise DamagedImage("the image's header cannot be read") from None
        raise UnsupportedImage(f"not an image format we read; they are {', '.join(FORMATS)}") from None
    except _BROKEN as error:
        raise DamagedImage(f"the image's header cannot be read: {error}") from None
    width, height = image.size
    if width < 1 or height < 1:
        raise DamagedImage(f"the image claims a size of {width} × {height}")
    if width * height > limits.max_pixels:
        raise TooLarge(
            f"the image is {width} × {height} = {width * height:,} pixels, the limit is {limits.max_pixels:,}"
        )
    if max(width, height) > limits.max_side:
        raise TooLarge(f"the image is {width} × {height}, the longest side may be {limits.max_side:,}")
    return image


def _gray_to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float gray to 8-bit gray `L`."""
    values = np.asarray(image)
    if image.mode == "F":
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        known = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
        values = np.rint((known - low) * (65535.0 / (high - low) if high > low else 0.0))
    table = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # nearest of 0..255, where 65535 is 255
    return Image.fromarray(table[np.clip(values, 0, 65535).astype(np.uint16)])


def _orientation(image: Image.Image) -> int:
    """EXIF's 1 to 8. EXIF that cannot be read turns nothing: the pixels are as good as before."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except _BROKEN:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB; the table is in the module's docstring."""
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _gray_to_8_bit(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_rgb(image: Image.Image, least_side: int | None = None) -> Image.Image:
    """A picture that Pillow has opened or made to an upright 8-bit RGB one. Raises DamagedImage.

    least_side: a JPEG may come at 1/2, 1/4 or 1/8 of its size, as long as its shorter side keeps this many pixels;
        None: at its full size.
    """
    try:
        if least_side is not None:
            width, height = image.size
            scale = least_side / min(width, height)
            image.draft(None, (ceil(width * scale), ceil(height * scale)))  # does nothing to other formats
        return _to_rgb(image)
    except _BROKEN as error:
        raise DamagedImage(f"the {image.format or image.mode} image is damaged: {error}") from None


def open_rgb(data: bytes, limits: Limits | None = None, least_side: int | None = None) -> Image.Image:
    """Encoded bytes to an upright 8-bit RGB picture, at the size that `to_rgb` says. Raises as `decode` does."""
    return to_rgb(_open(data, limits or Limits()), least_side)


def fit(image: Image.Image, transform: Transform) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Resize the shorter side and cut the central square: RGB picture to uint8 `(crop, crop, 3)`.

    Raises InvalidRequest unless `crop <= resize`: nothing is ever padded.
    """
    if transform.crop > transform.resize:
        raise InvalidRequest(f"crop {transform.crop} is larger than resize {transform.resize}")
    width, height = image.size
    scale = transform.resize / min(width, height)
    # Only the part that the crop keeps is resampled: a 1 × 65,000 strip would otherwise blow up to gigabytes.
    side = transform.crop / scale
    left, top = (width - side) / 2, (height - side) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + side, float(width)), min(top + side, float(height)))
    size = (transform.crop, transform.crop)
    return np.asarray(image.resize(size, _RESAMPLING[transform.filter], box=box), dtype=np.uint8)


def decode(data: bytes, transform: Transform, limits: Limits | None = None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Encoded bytes to the uint8 RGB array `(crop, crop, 3)`, values 0..255, C-contiguous.

    Raises:
        InvalidRequest: no bytes at all.
        TooLarge: more bytes or pixels than `limits` allows; nothing was decoded.
        UnsupportedImage: none of `FORMATS`, whatever the file is called.
        DamagedImage: the format is known, the content is broken or truncated.
    """
    return fit(open_rgb(data, limits, transform.scaled_side), transform)
