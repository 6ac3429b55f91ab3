"""Bodies as they trickle in: counted while they do, and not waited for without end."""

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from patchsight_serve.bodies import BodyLimits, read_body, read_images, read_multipart
from patchsight_serve.errors import DeadlineExceeded, InvalidRequest, TooLarge

LIMITS = BodyLimits(max_bytes=1000, max_images=3, timeout_s=10)


class Source:
    """An ASGI `receive` that yields the chunks and then hangs, or ends."""

    def __init__(self, chunks: list[bytes], hangs: bool = False) -> None:
        self.chunks, self.hangs, self.taken = list(chunks), hangs, 0

    async def __call__(self) -> dict[str, Any]:
        if not self.chunks and self.hangs:
            await asyncio.sleep(60)
        self.taken += 1
        body = self.chunks.pop(0) if self.chunks else b""
        return {"type": "http.request", "body": body, "more_body": bool(self.chunks) or self.hangs}


def request(source: Source, kind: str, **headers: str) -> Request:
    named = {"content-type": kind, **{k.replace("_", "-"): v for k, v in headers.items()}}
    raw = [(name.encode(), value.encode()) for name, value in named.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, source)


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    body = b""
    for name, filename, content in parts:
        disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
        body += f"--x\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"
    return body + b"--x--\r\n"


FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_chunks_are_put_together(size: int) -> None:
    body = form(("images", "a", b"one\r\n--y"), ("items", None, '["ä"]'.encode()), ("images", "b", b"\0\xff"))
    chunks = [body[i : i + size] for i in range(0, len(body), size)]
    assert asyncio.run(read_body(request(Source(chunks), "image/png"), LIMITS)) == body
    multipart = asyncio.run(read_multipart(request(Source(chunks), FORM), LIMITS))
    assert multipart.images == [b"one\r\n--y", b"\0\xff"]
    assert multipart.fields == {"items": '["ä"]'}


def test_a_body_is_refused_as_soon_as_it_is_too_long() -> None:
    source = Source([b"x" * 400] * 100)
    with pytest.raises(TooLarge, match="1,200 bytes or more, the limit is 1,000"):
        asyncio.run(read_body(request(source, "image/png"), LIMITS))
    assert source.taken == 3


def test_a_body_that_is_announced_too_long_is_not_read() -> None:
    source = Source([b"x"])
    with pytest.raises(TooLarge):
        asyncio.run(read_body(request(source, "image/png", content_length="1001"), LIMITS))
    assert source.taken == 0


@pytest.mark.parametrize("kind", ["image/png", "application/json", FORM])
def test_a_body_that_stops_coming_is_given_up(kind: str) -> None:
    source = Source([form(("images", "a", b"x"))[:-6]], hangs=True)
    limits = BodyLimits(max_bytes=1000, max_images=3, timeout_s=0.02)
    with pytest.raises(DeadlineExceeded, match="within 0.02 s"):
        asyncio.run(read_images(request(source, kind), limits))


def test_files_are_counted(png: bytes) -> None:
    limits = BodyLimits(max_bytes=10**6, max_images=3, timeout_s=10)
    for count in (3, 4):
        body = form(*[("images", "a", png)] * count)
        task = read_images(request(Source([body]), FORM), limits)
        if count <= 3:
            assert asyncio.run(task) == [png] * count
        else:
            with pytest.raises(TooLarge, match="the limit is 3"):
                asyncio.run(task)


def test_a_file_in_another_field_is_not_ignored() -> None:
    body = form(("images", "a", b"x"), ("image", "b", b"y"))
    with pytest.raises(InvalidRequest, match="'image'; files belong in 'images'"):
        asyncio.run(read_images(request(Source([body]), FORM), LIMITS))


@pytest.mark.parametrize("cut", range(1, 90, 4))
def test_a_cut_form_never_loses_an_image_silently(cut: int) -> None:
    body = form(("images", "a", b"one"), ("images", "b", b"two"))[:-cut]
    try:
        images = asyncio.run(read_images(request(Source([body]), FORM), LIMITS))
    except InvalidRequest:
        assert cut > 2  # the very last line break may be missing
    else:
        assert images == [b"one", b"two"]
