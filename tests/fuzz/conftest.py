"""Good images in every format, what is done to them, and the runs: seeded, in rounds, with an eye on memory.

`make test` runs round 0 of each test, `make acceptance` all of them, 100,000 inputs and more.
"""

import gc
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from patchsight_serve.app import create_app
from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.settings import ServeSettings

ROUNDS = 10
GROWTH = 64e6  # bytes of memory that a round may take and not give back: what the allocator holds, and no more
Edit = Callable[[bytes], bytes]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that wants `turn` runs in rounds; all but the first are for `make acceptance`."""
    if "turn" in metafunc.fixturenames:
        more = [pytest.param(n, marks=[pytest.mark.acceptance, pytest.mark.timeout(1800)]) for n in range(1, ROUNDS)]
        metafunc.parametrize("turn", [0, *more])


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def fuzz(turn: int) -> Callable[..., None]:
    """`fuzz(strategy, check, few, many)`: check `few` in round 0, `many` in every other; a round is always the same."""

    def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], few: int, many: int) -> None:
        sizes = []
        half_of_it = (many if turn else few) // 2
        for half in (0, 1):

            @seed(2 * turn + half)
            @settings(max_examples=half_of_it, database=None, deadline=None, suppress_health_check=list(HealthCheck))
            @given(strategy)
            def run(case: Any) -> None:
                check(case)

            run()
            sizes.append(resident())
        assert sizes[1] - sizes[0] < GROWTH, sizes

    return fuzz


@pytest.fixture(scope="session")
def good() -> dict[str, bytes]:
    """Small images by name: each format, and what each has of its own."""
    y, x = np.mgrid[:20, :24]
    picture = Image.fromarray(np.stack([10 * x, 12 * y, 5 * x + y], axis=2).clip(1, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    other = picture.transpose(Image.Transpose.ROTATE_180)
    deep = Image.fromarray(np.asarray(picture)[..., 0].astype(np.uint16) * 257)
    animated: dict[str, Any] = {"save_all": True, "append_images": [other]}

    def file(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return {
        "jpeg": file(picture, "JPEG", exif=exif, comment=b"x"),
        "jpeg progressive": file(picture, "JPEG", progressive=True, subsampling=0),
        "jpeg cmyk": file(picture.convert("CMYK"), "JPEG"),
        "png": file(picture, "PNG"),
        "png palette": file(picture.quantize(16), "PNG", transparency=3),
        "png 16": file(deep, "PNG"),
        "png alpha": file(picture.convert("RGBA"), "PNG", exif=exif),
        "webp": file(picture, "WEBP", exif=exif),
        "webp animated": file(picture, "WEBP", lossless=True, **animated),
        "gif": file(picture.quantize(8), "GIF", **animated),
        "bmp": file(picture, "BMP"),
        "bmp palette": file(picture.quantize(4), "BMP"),
        "tiff": file(picture, "TIFF"),
        "tiff lzw": file(deep, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": file(picture, "TIFF", compression="jpeg"),
        "tiff deflate": file(picture.convert("CMYK"), "TIFF", compression="tiff_adobe_deflate"),
        "avif": file(picture, "AVIF"),
    }


# Numbers that headers lie with: at the edges of 8, 16 and 32 bits, of both byte orders.
LIES = [
    struct.pack(order + size, number)
    for size, numbers in (("B", (0, 1, 127, 128, 255)), ("H", (0, 1, 255, 32768, 65535)),
                          ("I", (0, 1, 65536, 2**31 - 1, 2**31, 2**32 - 1)))
    for number in numbers for order in "<>"
]  # fmt: skip


def put(data: bytes, at: int, new: bytes, over: int = 0) -> bytes:
    """`new` at `at`, in place of `over` bytes."""
    return data[:at] + new + data[at + over :]


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have right checksums again, so that what was changed in them is looked at."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out + data[at:]


@pytest.fixture(scope="session")
def damaged() -> Callable[[dict[str, bytes]], st.SearchStrategy[bytes]]:
    """`damaged(files)`: one of the files after one to four edits."""

    def damaged(files: dict[str, bytes]) -> st.SearchStrategy[bytes]:
        place = st.integers(0, 2**20)
        near = st.integers(0, 79)  # most of a header
        donor = st.sampled_from(sorted(files)).map(files.__getitem__)

        def cut(at: int, length: int) -> Edit:
            return lambda data: put(data, at % (len(data) + 1), b"", length)

        def truncate(at: int) -> Edit:
            return lambda data: data[: at % (len(data) + 1)]

        def flip(at: int, bits: int) -> Edit:
            def edit(data: bytes) -> bytes:
                if not data:
                    return data
                i = at % len(data)
                return put(data, i, bytes([data[i] ^ bits]), 1)

            return edit

        def repeat(at: int, length: int, times: int) -> Edit:
            def edit(data: bytes) -> bytes:
                i = at % (len(data) + 1)
                return put(data, i, data[i : i + length] * times)

            return edit

        def lie(at: int, number: bytes) -> Edit:
            return lambda data: put(data, at % (len(data) + 1), number, len(number))

        def splice(at: int, other: bytes, begin: int, length: int, over: bool) -> Edit:
            piece = other[begin % len(other) :][:length]
            return lambda data: put(data, at % (len(data) + 1), piece, len(piece) if over else 0)

        some = st.integers(1, 64)
        edits = st.one_of(
            st.builds(cut, place, some),
            st.builds(truncate, place),
            st.builds(flip, place, st.integers(1, 255)),
            st.builds(flip, near, st.integers(1, 255)),
            st.builds(repeat, place, some, st.integers(1, 20)),
            st.builds(lie, near, st.sampled_from(LIES)),
            st.builds(lie, place, st.sampled_from(LIES)),
            st.builds(splice, place, donor, place, some, st.booleans()),
            st.builds(lie, place, st.binary(min_size=1, max_size=16)),
        )

        def apply(data: bytes, changes: list[Edit]) -> bytes:
            for change in changes:
                data = change(data)
            return with_checksums(data) if data.startswith(b"\x89PNG\r\n\x1a\n") else data

        return st.builds(apply, donor, st.lists(edits, min_size=1, max_size=4))

    return damaged


class NeverZero(FakeEncoder):
    """So that a black picture can be found by its direction, too."""

    def run(self, images: Pixels, outputs: Any) -> dict[str, Values]:
        return {name: values + np.float32(1) for name, values in super().run(images, outputs).items()}


@pytest.fixture(scope="session")
def new_app(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """`new_app()`: an application that says no soon to what is large."""

    def new_app() -> Any:
        small = ServeSettings(
            sample_gallery=False, state_dir=tmp_path_factory.mktemp("state"), max_pixels=1_000_000, max_images=8,
            max_body_bytes=1_000_000, max_image_bytes=200_000,
        )  # fmt: skip
        return create_app({"fake": NeverZero()}, small)

    return new_app


@pytest.fixture(scope="module")
def client(new_app: Callable[[], Any]) -> Iterator[TestClient]:
    """A client of a running application; what its inside raises is a 500, as for any client."""
    with TestClient(new_app(), raise_server_exceptions=False) as client:
        yield client
