"""What a client sends: encoded images, made of whatever the caller has, as they are or as the encoder will see them."""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from patchsight_serve.decode import decode, fit, to_rgb
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.manifest import Transform

T = TypeVar("T")
# An encoded image, the path of one, a Pillow image, or an array uint8 (H, W), (H, W, 3) or (H, W, 4).
Picture = bytes | bytearray | memoryview | str | os.PathLike[str] | Image.Image | np.ndarray[Any, np.dtype[np.uint8]]


def encoded(picture: Picture, transform: Transform | None = None) -> bytes:
    """The bytes to send. What has no bytes of its own becomes a PNG, which loses nothing.

    transform: the encoder's; the picture is decoded and cut to the square that the encoder sees, as the server would.

    Raises PatchsightError: a file that cannot be read, an array of another kind, and with `transform` what `decode`
    raises.
    """
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture)
    if isinstance(picture, Image.Image):
        rgb = to_rgb(picture)
        return _png(Image.fromarray(fit(rgb, transform)) if transform else rgb)
    data = bytes(picture) if isinstance(picture, bytes | bytearray | memoryview) else _read(picture)
    return _png(Image.fromarray(decode(data, transform))) if transform else data


def batches(pictures: Iterable[Picture], most: int, most_bytes: int, side: int | None) -> Iterator[list[Picture]]:
    """Lists of at most `most` pictures, and of more than one only if they have about `most_bytes` bytes at most.

    side: what they will be cut to; None if they are sent as they are. Raises InvalidRequest for a single picture.
    """
    if isinstance(pictures, bytes | bytearray | memoryview | str | os.PathLike | Image.Image):
        raise InvalidRequest(f"one {type(pictures).__name__} was given for a list of pictures")
    if isinstance(pictures, np.ndarray) and pictures.ndim != 4:
        raise InvalidRequest(f"an array {pictures.shape} is no list of pictures; one is (N, H, W, 3)")
    yield from cut(pictures, most, most_bytes, weight if side is None else lambda _: side * side * 3)


def cut(items: Iterable[T], most: int, most_bytes: int, weigh: Callable[[T], int]) -> Iterator[list[T]]:
    """As `batches`, of anything that has a weight in bytes."""
    batch: list[T] = []
    size = 0
    for item in items:
        weight = weigh(item)
        if batch and (len(batch) == most or size + weight > most_bytes):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += weight
    if batch:
        yield batch


def weight(picture: Picture) -> int:
    """Bytes that it will have, or the most that they can be; a file that is not there has none."""
    if isinstance(picture, bytes | bytearray):
        return len(picture)
    if isinstance(picture, np.ndarray | memoryview):
        return picture.nbytes
    if isinstance(picture, Image.Image):
        return picture.width * picture.height * 3
    try:
        return Path(picture).stat().st_size
    except (OSError, ValueError, TypeError):
        return 0  # `encoded` says what is wrong with it


def _read(path: str | os.PathLike[str]) -> bytes:
    if not isinstance(path, str | os.PathLike):
        raise InvalidRequest(f"a {type(path).__name__} is no picture")
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # the second: a path with a zero byte
        raise PatchsightError(f"{path!s}: {getattr(error, 'strerror', None) or error}") from None


def _from_array(array: np.ndarray[Any, np.dtype[Any]]) -> Image.Image:
    channels = array.shape[2:] if array.ndim == 3 else ()
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in ((), (3,), (4,)) or not array.size:
        raise InvalidRequest(
            f"an array {array.dtype} {array.shape} is no picture; one is uint8 (H, W), (H, W, 3) or (H, W, 4)"
        )
    return Image.fromarray(array)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # of 224 px in a quarter of the default's time, for 7 % more bytes
    return file.getvalue()
