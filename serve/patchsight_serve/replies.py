"""What goes back: images, JSON, or numbers as npy, npz or bare float32. No vector passes through pydantic."""

import base64
import io
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from patchsight_serve.encoder import Values
from patchsight_serve.errors import InvalidRequest, Overloaded, PatchsightError
from patchsight_serve.manifest import Manifest

JSON, NPY, NPZ, RAW, PNG = (
    "application/json", "application/x-npy", "application/x-npz", "application/octet-stream", "image/png",
)  # fmt: skip

NO_SNIFFING = {"X-Content-Type-Options": "nosniff"}

# What browsers show, by how it begins.
SHOWN = {
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/bmp": re.compile(rb"BM"),
    "image/avif": re.compile(rb"....ftypavi[fs]", re.DOTALL),
}


@lru_cache(256)  # clients say the same again and again
def negotiate(accept: str | None, offered: tuple[str, ...]) -> str:
    """The offered media type that the Accept header likes best; the first of them where it does not mind.

    Raises InvalidRequest if it accepts none.
    """
    ranges = [_quality(part) for part in (accept or "*/*").split(",") if part.strip()]

    def liking(media_type: str) -> float:
        family = media_type.partition("/")[0] + "/*"
        for pattern in (media_type, family, "*/*"):  # the most specific range decides
            for name, quality in ranges:
                if name == pattern:
                    return quality
        return 0.0

    best = max(offered, key=liking)
    if liking(best) <= 0:
        raise InvalidRequest(f"Accept is {accept!r}, but the reply can only be {', '.join(offered)}", "Accept")
    return best


def _quality(part: str) -> tuple[str, float]:
    name, _, parameters = part.partition(";")
    for parameter in parameters.split(";"):
        key, _, value = parameter.strip().partition("=")
        if key == "q":
            try:
                return name.strip().lower(), float(value)
            except ValueError:
                return name.strip().lower(), 0.0
    return name.strip().lower(), 1.0


def json_reply(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON; numpy arrays in `content` are written as lists, and must be C-contiguous."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, dict(headers or {}), JSON)


def identity(manifest: Manifest) -> dict[str, str]:
    """Which encoder made the numbers."""
    return {"name": manifest.name, "sha256": manifest.sha256}


def packed(array: Values) -> dict[str, Any]:
    """An array of more than one axis, in JSON: shape, dtype, and base64 of the little-endian values in C order."""
    data = base64.b64encode(array.astype("<f4").tobytes()).decode("ascii")
    return {"shape": array.shape, "dtype": "float32", "data": data}


def array_reply(arrays: Mapping[str, Values], media_type: str, manifest: Manifest) -> Response:
    """Binary reply: `arrays` by output, each with the images along its first axis.

    npz holds them all; npy and octet-stream hold one, and raise InvalidRequest if there are more.
    """
    headers = {"X-Encoder": manifest.name, "X-Encoder-Sha256": manifest.sha256}
    if media_type == NPZ:
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **{name: a.astype("<f4") for name, a in arrays.items()})
        return Response(file.getvalue(), 200, headers, NPZ)
    if len(arrays) != 1:
        raise InvalidRequest(
            f"{media_type} holds one output, {len(arrays)} were asked for; {NPZ} holds several", "outputs"
        )
    (array,) = (np.ascontiguousarray(a, "<f4") for a in arrays.values())
    headers |= {"X-Shape": ",".join(map(str, array.shape)), "X-Dtype": "float32"}
    if media_type == NPY:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        return Response(file.getvalue(), 200, headers, NPY)
    return Response(array.tobytes(), 200, headers, RAW)


def image_reply(data: bytes) -> Response:
    """A stranger's image, as something that a browser shows as an image or not at all."""
    headers = NO_SNIFFING | {"Content-Security-Policy": "default-src 'none'; sandbox"}
    for kind, beginning in SHOWN.items():
        if beginning.match(data):
            return Response(data, 200, headers, kind)
    return Response(data, 200, headers | {"Content-Disposition": "attachment"}, RAW)


def error_body(error: PatchsightError) -> dict[str, str | None]:
    """The inner part of every error, for a request or for one image of it."""
    return {"code": error.code, "message": error.message, "param": error.param}


class ErrorResponse(Response):
    """An error in the one shape that all have. Tells `Observe` its code, as `error` in the request's state."""

    def __init__(self, body: dict[str, str | None], status: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(orjson.dumps({"error": body}), status, {**NO_SNIFFING, **(headers or {})}, JSON)
        self.error = body["code"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        scope.setdefault("state", {})["error"] = self.error
        await super().__call__(scope, receive, send)


def error_reply(error: PatchsightError) -> ErrorResponse:
    """An error with the status of its class."""
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return ErrorResponse(error_body(error), error.status, headers)
