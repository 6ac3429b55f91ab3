"""The three ways in which images arrive: a raw body, multipart/form-data, or JSON with base64. Read while counting."""

import asyncio
import binascii
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from patchsight_serve.errors import DeadlineExceeded, InvalidRequest, PatchsightError, TooLarge, UnsupportedImage

FIELD = "images"  # the multipart field and the JSON key


@dataclass(frozen=True)
class BodyLimits:
    """What one request may bring."""

    max_bytes: int  # of the whole body, as it comes over the wire
    max_images: int
    timeout_s: float  # for the body to arrive


@dataclass(frozen=True)
class Multipart:
    """A read multipart body: the files named `images`, in order, and the text fields (the last of a name counts)."""

    images: list[bytes]
    fields: dict[str, str]


class _InMemory(MultiPartParser):
    spool_max_size = 1 << 40  # the body's size is limited, so nothing need go to the disk
    ended = False  # the last boundary was there; a body without it was cut, and an image of it may be missing

    def on_end(self) -> None:
        self.ended = True

    def close(self) -> None:
        """Free what was parsed, the file that a cut body broke off in included."""
        for file in self._files_to_close_on_error:
            file.close()


def media_type(request: Request) -> str:
    """The body's media type in lower case, without parameters; empty if not given."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_images(request: Request, limits: BodyLimits) -> list[bytes | PatchsightError]:
    """The encoded images of a raw, multipart or JSON body, at least one.

    In JSON, an entry that is not base64 is an error in its place, and harms no other image.

    Raises:
        InvalidRequest: malformed, or without any image.
        TooLarge: more bytes or images than `limits` allows.
        UnsupportedImage: a media type that cannot hold images.
        DeadlineExceeded: the body did not arrive in time.
    """
    kind = media_type(request)
    if kind == "multipart/form-data":
        images: list[bytes | PatchsightError] = list((await read_multipart(request, limits)).images)
        if not images:
            raise InvalidRequest(f"the form has no file in a field named {FIELD!r}", FIELD)
        return images
    if kind == "application/json":
        return from_json(await read_body(request, limits), limits)
    if kind.startswith("image/") or kind in ("", "application/octet-stream"):
        return [await read_body(request, limits)]
    raise UnsupportedImage(
        f"a body of type {kind!r} is not read; send image/*, application/octet-stream, multipart/form-data or "
        "application/json",
        "Content-Type",
    )


async def read_body(request: Request, limits: BodyLimits) -> bytes:
    """The whole body. Raises TooLarge as soon as it is known to be, DeadlineExceeded."""
    try:
        async with asyncio.timeout(limits.timeout_s):
            chunks = [chunk async for chunk in counted(request, limits)]
    except TimeoutError:
        raise _late(limits) from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def read_multipart(request: Request, limits: BodyLimits) -> Multipart:
    """Files named `images` and text fields of a multipart/form-data body. There may be no image at all.

    Raises InvalidRequest, TooLarge, DeadlineExceeded.
    """
    parser = _InMemory(
        request.headers,
        counted(request, limits),
        max_files=limits.max_images,
        max_fields=32,
        max_part_size=limits.max_bytes,
    )
    try:
        async with asyncio.timeout(limits.timeout_s):
            form = await parser.parse()
        if not parser.ended:
            raise InvalidRequest("the multipart body is malformed: it ends before its last boundary")
        return await _parts(form)
    except TimeoutError:
        raise _late(limits) from None
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise too_many(None, limits) from None
        raise InvalidRequest(f"the multipart body is malformed: {error.message}") from None
    except (KeyError, ValueError) as error:  # no boundary in the header, undecodable names
        raise InvalidRequest(f"the multipart body is malformed: {error}") from None
    finally:
        parser.close()


async def _parts(form: FormData) -> Multipart:
    images: list[bytes] = []
    fields: dict[str, str] = {}
    for name, value in form.multi_items():
        if isinstance(value, str):
            fields[name] = value
        elif name == FIELD:
            images.append(await value.read())
            await value.close()  # now, and not with the last one: a large form would be in memory twice
        else:
            raise InvalidRequest(f"the form has a file in the field {name!r}; files belong in {FIELD!r}", name)
    return Multipart(images, fields)


def parse_json(body: bytes) -> Any:
    """Raises InvalidRequest where the body is not JSON."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def from_json(body: bytes, limits: BodyLimits) -> list[bytes | PatchsightError]:
    """`{"images": [base64 or data URI, …]}` to bytes. Raises InvalidRequest, TooLarge."""
    content = parse_json(body)
    images = content.get(FIELD) if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise InvalidRequest('the JSON body must be {"images": [base64 or data URI, …]} with at least one image', FIELD)
    if unknown := set(content) - {FIELD}:
        raise InvalidRequest(f"unknown key {min(unknown)!r} in the JSON body", min(unknown))
    if len(images) > limits.max_images:
        raise too_many(len(images), limits)
    return [from_base64(image) for image in images]


def from_base64(text: object) -> bytes | PatchsightError:
    """One image of a JSON body, base64 or a data URI, to its bytes, or what is wrong with it."""
    if not isinstance(text, str):
        return InvalidRequest(f"an image must be a string of base64 or a data URI, not {type(text).__name__}")
    if text.startswith(("http:", "https:", "file:")):
        return InvalidRequest("images are never fetched from a URL; send their bytes")
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            return InvalidRequest("a data URI must be base64: data:image/…;base64,…")
    try:
        return binascii.a2b_base64("".join(text.split()), strict_mode=True)  # `base64 FILE` breaks its lines
    except ValueError as error:
        return InvalidRequest(f"not base64: {error}")


async def counted(request: Request, limits: BodyLimits) -> AsyncGenerator[bytes, None]:
    """The body's chunks, refused as soon as they, or what Content-Length announces, pass the limit."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limits.max_bytes:
        raise _too_long(int(announced), limits)
    total = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk, more = message.get("body", b""), message.get("more_body", False)
        total += len(chunk)
        if total > limits.max_bytes:
            raise _too_long(total, limits)
        if chunk:
            yield chunk


def _late(limits: BodyLimits) -> DeadlineExceeded:
    return DeadlineExceeded(f"the body did not arrive within {limits.timeout_s:g} s")


def _too_long(size: int, limits: BodyLimits) -> TooLarge:
    return TooLarge(f"the body has {size:,} bytes or more, the limit is {limits.max_bytes:,}")


def too_many(count: int | None, limits: BodyLimits, param: str = FIELD) -> TooLarge:
    """The error of a request with more images than it may have; None if nobody counted them to the end."""
    said = f"{count:,} images" if count else "more images than allowed"
    return TooLarge(f"the request has {said}, the limit is {limits.max_images}", param)
