"""Each pixel mode against what its definition says, `fit` against Pillow, and broken files of every format."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchsight_serve.decode import FORMATS, Limits, decode, fit, open_rgb
from patchsight_serve.errors import DamagedImage, InvalidRequest, PatchsightError, TooLarge, UnsupportedImage
from patchsight_serve.manifest import Transform

Encode = Callable[..., bytes]
TRANSFORM = Transform(resize=16, crop=16)


def rgb(data: bytes) -> np.ndarray:
    image = open_rgb(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_file(width: int, height: int, depth: int, color: int, rows: bytes = b"") -> bytes:
    """A PNG written by hand, so that no writer's limits or conversions stand between the test and the bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# Formats


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel(format: str, picture: np.ndarray, encode: Encode) -> None:
    np.testing.assert_array_equal(rgb(encode(picture, format)), picture)


def test_lossless_webp_keeps_every_pixel(picture: np.ndarray, encode: Encode) -> None:
    np.testing.assert_array_equal(rgb(encode(picture, "WEBP", lossless=True)), picture)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_come_close(format: str, picture: np.ndarray, encode: Encode) -> None:
    assert np.abs(rgb(encode(picture, format, quality=95)).astype(int) - picture).mean() < 3


def test_gif_keeps_colors_that_fit_its_palette(encode: Encode) -> None:
    colors = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8).repeat(8, 0).repeat(8, 1)
    np.testing.assert_array_equal(rgb(encode(colors, "GIF")), colors)


# Modes


def test_cmyk_is_ink_on_white_paper(encode: Encode) -> None:
    ink = np.zeros((16, 48, 4), np.uint8)
    ink[:, 16:32] = [255, 0, 0, 0]  # cyan
    ink[:, 32:] = [0, 0, 0, 255]  # black
    pixels = rgb(encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=100))
    for column, color in ((8, [255, 255, 255]), (24, [0, 255, 255]), (40, [0, 0, 0])):
        np.testing.assert_allclose(pixels[8, column], color, atol=6)


def test_16_bit_gray_is_scaled_to_the_nearest_of_256() -> None:
    values = np.array([0, 1, 128, 129, 257, 32767, 32768, 65406, 65535], np.uint16)
    data = png_file(len(values), 1, 16, 0, b"\0" + values.astype(">u2").tobytes())
    expected = [round(float(v) / 257.0) for v in values]
    np.testing.assert_array_equal(rgb(data)[0], np.repeat(expected, 3).reshape(-1, 3))


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_wide_integers_in_tiff_are_scaled_and_clipped(dtype: str, encode: Encode) -> None:
    top = 65535 if dtype == "uint16" else 70000
    values = np.array([[0, 257 * 100, 257 * 200, top]], dtype)
    np.testing.assert_array_equal(rgb(encode(values, "TIFF"))[0, :, 1], [0, 100, 200, 255])


def test_float_gray_is_scaled_from_its_own_range(encode: Encode) -> None:
    values = np.array([[-1.0, 0.0, 1.0, 3.0]], np.float32)
    np.testing.assert_array_equal(rgb(encode(values, "TIFF"))[0, :, 0], [0, 64, 128, 255])


def test_float_gray_of_one_value_or_none_is_black(encode: Encode) -> None:
    for value in (5.0, np.nan, np.inf):
        assert rgb(encode(np.full((2, 2), value, np.float32), "TIFF")).max() == 0


def test_float_gray_beyond_numbers(encode: Encode) -> None:
    values = np.array([[-np.inf, 1.0, np.nan, 3.0, np.inf]], np.float32)
    assert rgb(encode(values, "TIFF"))[0, :, 0].tolist() == [0, 0, 0, 255, 255]


def test_rgb_of_16_bits_keeps_the_high_byte() -> None:
    row = np.array([[0x0000, 0x8034, 0xFF00]], np.uint16)
    assert rgb(png_file(1, 1, 16, 2, b"\0" + row.astype(">u2").tobytes()))[0, 0].tolist() == [0x00, 0x80, 0xFF]


def test_one_bit_is_black_and_white() -> None:
    assert rgb(png_file(8, 1, 1, 0, b"\0\x0f"))[0, :, 2].tolist() == [0] * 4 + [255] * 4


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255.0
    return color * a + 255.0 * (1.0 - a)


def test_alpha_lies_over_white(picture: np.ndarray, encode: Encode) -> None:
    alpha = np.arange(48 * 64).reshape(48, 64).astype(np.uint8)
    expected = over_white(picture, alpha)
    np.testing.assert_allclose(rgb(encode(np.dstack([picture, alpha]))), expected, atol=1)
    np.testing.assert_allclose(
        rgb(encode(np.dstack([picture, alpha]), "WEBP", lossless=True, exact=True)), expected, atol=1
    )


def test_gray_with_alpha_lies_over_white(encode: Encode) -> None:
    gray, alpha = np.array([[10, 10, 200]], np.uint8), np.array([[0, 128, 255]], np.uint8)
    expected = over_white(np.repeat(gray[..., None], 3, 2), alpha)
    np.testing.assert_allclose(rgb(encode(np.dstack([gray, alpha]))), expected, atol=1)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_the_transparent_color_of_a_palette_is_white(format: str, encode: Encode) -> None:
    image = Image.new("P", (4, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2, 1])
    pixels = rgb(encode(image, format, transparency=1))
    assert pixels[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90], [255, 255, 255]]


def test_a_palette_may_be_partly_transparent(encode: Encode) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([100, 0, 0, 0, 100, 0])
    image.putdata([0, 1])
    pixels = rgb(encode(image, transparency=bytes([128, 255])))
    np.testing.assert_allclose(
        pixels[0], [over_white(np.array([100, 0, 0]), np.array(128)).ravel(), [0, 100, 0]], atol=1
    )


def test_gray_and_rgb_may_name_a_transparent_color(encode: Encode) -> None:
    assert rgb(encode(np.array([[7, 8]], np.uint8), transparency=7))[0, :, 0].tolist() == [255, 8]
    colors = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    assert rgb(encode(colors, transparency=(1, 2, 3)))[0].tolist() == [[255, 255, 255], [4, 5, 6]]


# EXIF's definition: where row 0 and column 0 of the stored picture belong in the upright one.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_once(orientation: int, format: str, picture: np.ndarray, encode: Encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = rgb(encode(picture, format, exif=exif, **options))
    np.testing.assert_array_equal(pixels, UPRIGHT[orientation](picture))


def test_exif_orientation_of_jpeg_and_of_16_bit_gray(picture: np.ndarray, encode: Encode) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = rgb(encode(picture, "JPEG", exif=exif, quality=95)).astype(int)
    assert np.abs(turned - UPRIGHT[6](picture)).mean() < 3
    gray = picture[..., :1]
    wide = encode(gray[..., 0].astype(np.uint16) * 257, exif=exif)
    np.testing.assert_array_equal(rgb(wide)[..., :1], UPRIGHT[6](gray))


@pytest.mark.parametrize("content", [b"Exif\0\0junk", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\xff" * 40])
def test_exif_that_cannot_be_read_does_no_harm(content: bytes, picture: np.ndarray, encode: Encode) -> None:
    np.testing.assert_array_equal(rgb(encode(picture, "WEBP", lossless=True, exif=content)), picture)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(format: str, encode: Encode) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = rgb(encode(frames[0], format, save_all=True, append_images=frames[1:], **options))
    assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


# The transform


@pytest.mark.parametrize("filter", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(
    ("size", "resize", "crop"),
    [
        ((64, 48), 24, 24),
        ((64, 48), 24, 16),
        ((48, 64), 12, 12),
        ((32, 32), 16, 12),
        ((20, 10), 30, 20),
        ((8, 8), 8, 8),
    ],
)
def test_fit_is_resize_then_center_crop(
    filter: str, size: tuple[int, int], resize: int, crop: int, picture: np.ndarray
) -> None:
    """Where the resized sides and the crop's corner are whole numbers, that is defined to the pixel."""
    image = Image.fromarray(picture).resize(size)
    scale = resize / min(size)
    width, height = round(size[0] * scale), round(size[1] * scale)
    left, top = (width - crop) // 2, (height - crop) // 2
    expected = image.resize((width, height), getattr(Image.Resampling, filter.upper()))
    expected = expected.crop((left, top, left + crop, top + crop))
    actual = fit(image, Transform(resize=resize, crop=crop, filter=filter))  # type: ignore[arg-type]
    assert actual.dtype == np.uint8
    assert actual.flags.c_contiguous
    np.testing.assert_array_equal(actual, np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 65000), (65000, 1), (3, 7), (17, 16)])
def test_any_shape_fits(size: tuple[int, int]) -> None:
    assert (fit(Image.new("RGB", size, (1, 2, 3)), TRANSFORM) == [1, 2, 3]).all()


def test_a_crop_beyond_the_resized_picture_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="crop 20 is larger than resize 16"):
        fit(Image.new("RGB", (30, 30)), Transform(resize=16, crop=20))


def test_decode_is_open_then_fit(picture: np.ndarray, png: bytes) -> None:
    np.testing.assert_array_equal(decode(png, TRANSFORM), fit(Image.fromarray(picture), TRANSFORM))


# Decoding at a part of the size


SCALED = Transform(decoder="pillow-scaled", resize=16, crop=16)  # a shorter side of 160 at least


@pytest.mark.parametrize(
    ("size", "part"),
    [((640, 480), 2), ((480, 320), 2), ((480, 319), 1), ((2000, 1280), 8), ((1280, 5000), 8), ((100, 90), 1)],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(
    size: tuple[int, int], part: int, orientation: int, picture: np.ndarray, encode: Encode
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    data = encode(photo, "JPEG", quality=95, exif=exif)
    small = open_rgb(data, least_side=SCALED.scaled_side)
    expected = tuple(-(-side // part) for side in (size if orientation == 1 else size[::-1]))
    assert small.size == expected
    full = open_rgb(data)
    assert full.size == (size if orientation == 1 else size[::-1])
    # The same picture: only what resizing smooths away differs.
    difference = decode(data, SCALED).astype(int) - fit(full, SCALED)
    assert abs(difference).max() <= 3
    if part == 1:
        np.testing.assert_array_equal(np.asarray(small), np.asarray(full))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_are_never_decoded_at_a_part(format: str, picture: np.ndarray, encode: Encode) -> None:
    data = encode(Image.fromarray(picture).resize((640, 480)), format)
    assert open_rgb(data, least_side=SCALED.scaled_side).size == (640, 480)


def test_cmyk_and_several_pictures_in_a_jpeg_at_a_part(picture: np.ndarray, encode: Encode) -> None:
    photo = Image.fromarray(picture).resize((640, 480), Image.Resampling.BICUBIC)
    for data in (
        encode(photo.convert("CMYK"), "JPEG", quality=95),
        encode(photo.convert("L"), "JPEG", quality=95),
        encode(photo, "MPO", quality=95, save_all=True, append_images=[photo.rotate(180)]),
    ):
        assert open_rgb(data, least_side=SCALED.scaled_side).size == (320, 240)
        assert abs(decode(data, SCALED).astype(int) - decode(data, TRANSFORM)).max() <= 3


# What is refused


def test_no_bytes() -> None:
    with pytest.raises(InvalidRequest, match="0 bytes"):
        decode(b"", TRANSFORM)


@pytest.mark.parametrize("data", [b"text named .jpg", b"\0" * 100, b"<svg/>", b"%PDF-1.4", b"P6 1 1 255 abc"])
def test_other_formats(data: bytes) -> None:
    with pytest.raises(UnsupportedImage, match="JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF"):
        decode(data, TRANSFORM)


def test_heic_without_its_reader_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchsight_serve.decode._HEIF", ())
    with pytest.raises(UnsupportedImage, match=r"patchsight\[heif\]"):
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", TRANSFORM)


def test_too_many_bytes(png: bytes) -> None:
    with pytest.raises(TooLarge, match=f"{len(png):,} bytes, the limit is 100"):
        decode(png, TRANSFORM, Limits(max_bytes=100))


@pytest.mark.parametrize(
    ("width", "height", "limits"),
    [
        (50_000, 50_000, Limits()),
        (11, 10, Limits(max_pixels=109)),
        (65_501, 1, Limits()),
        (2**31 - 1, 2**31 - 1, Limits()),
    ],
)
def test_too_many_pixels_are_known_from_the_header(width: int, height: int, limits: Limits) -> None:
    # There is no pixel in this file: had one been asked for, the error would be another.
    with pytest.raises(TooLarge, match=f"{width} × {height}"):
        decode(png_file(width, height, 8, 2), TRANSFORM, limits)


def test_as_many_pixels_as_allowed(encode: Encode) -> None:
    decode(encode(np.zeros((10, 11, 3), np.uint8)), TRANSFORM, Limits(max_pixels=110))


@pytest.mark.parametrize("format", FORMATS)
def test_half_a_file_is_damaged(format: str, picture: np.ndarray, encode: Encode) -> None:
    data = encode(picture, format)
    with pytest.raises(DamagedImage):
        decode(data[: len(data) // 2], TRANSFORM)


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "BMP"])  # `BM` begins many a text
def test_a_file_cut_in_its_header_is_damaged(format: str, picture: np.ndarray, encode: Encode) -> None:
    with pytest.raises(DamagedImage, match="header"):
        decode(encode(picture, format)[:14], TRANSFORM)


# Broken files

SMALL = (np.arange(20 * 24 * 3).reshape(20, 24, 3) % 251).astype(np.uint8)


def samples() -> dict[str, bytes]:
    found = {}
    for format in FORMATS:
        file = io.BytesIO()
        Image.fromarray(SMALL).save(file, format)
        found[format] = file.getvalue()
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SMALL).save(file, "JPEG", exif=exif, progressive=True)
    found["JPEG with EXIF"] = file.getvalue()
    file = io.BytesIO()
    Image.fromarray(SMALL).save(file, "TIFF", compression="tiff_lzw")
    found["TIFF LZW"] = file.getvalue()
    file = io.BytesIO()
    Image.fromarray(SMALL).quantize(8).save(file, "PNG", transparency=bytes([0, 100, 255]))
    found["PNG palette"] = file.getvalue()
    return found


SAMPLES = samples()


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A valid file, cut, with bits flipped and bytes put in."""
    data = bytearray(SAMPLES[draw(st.sampled_from(sorted(SAMPLES)))])
    for position, bit in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 7)), max_size=12)):
        data[position] ^= 1 << bit
    if draw(st.booleans()):
        position = draw(st.integers(0, len(data)))
        data[position:position] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def decoded_or_refused(data: bytes) -> None:
    try:
        pixels = decode(data, TRANSFORM, Limits(max_pixels=1_000_000))
    except PatchsightError as error:
        assert 400 <= error.status < 500  # noqa: PT017 - decoding is a right answer as well
    else:
        assert pixels.shape == (16, 16, 3)


@settings(max_examples=500, deadline=None)
@given(data=broken())
def test_broken_files_are_decoded_or_refused_and_nothing_else(data: bytes) -> None:
    decoded_or_refused(data)


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
@settings(max_examples=100_000, deadline=None, database=None)
@given(data=broken())
def test_a_hundred_thousand_broken_files(data: bytes) -> None:
    decoded_or_refused(data)


def test_warnings_of_pillow_reach_nobody(picture: np.ndarray, encode: Encode) -> None:
    """Each file's text would differ: a log, and Python's list of warnings shown, that grow with the traffic."""
    data = encode(picture, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x0e\0\x02\0\0\xff\xff\0\0\0\x64")
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
        open_rgb(data)
    assert seen == []
