"""What a client says to a server and makes of its answers, without a socket: generators that yield a `Call`, a `Wait`
or a `Work`, are sent what came of it, and return the result. `client` and `async_client` do what they yield."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypedDict, TypeVar

import httpx
import numpy as np
from pydantic import ValidationError

from patchsight_serve.client_images import Picture, batches, encoded
from patchsight_serve.client_steps import JSON, NPY, Call, Steps, Work, ask, named
from patchsight_serve.encoder import Values
from patchsight_serve.errors import Conflict, InvalidRequest, NotFound, PatchsightError, TooLarge
from patchsight_serve.item import Identity
from patchsight_serve.manifest import Transform

H = TypeVar("H", httpx.Client, httpx.AsyncClient)
Row = Values | PatchsightError  # float32 (D,), or what is wrong with the image


class Options(TypedDict, total=False):
    """What can be chosen of a client, with the default."""

    encoder: str | None  # name; None: the server's default
    output: str  # recommended (default), cls, mean or both
    resize: bool  # False; True: send the square that the encoder sees, as a PNG: the same numbers for fewer bytes
    batch: int  # images per request: 32
    batch_bytes: int  # of a request, about: 16 MiB
    concurrency: int  # requests at once: 4
    timeout_s: float  # without any byte of an answer: 120
    patience_s: float  # that a request is repeated for while the server is busy: 300
    outage_s: float  # that one is repeated for while a server is away that was there: 0, which is once


class Conversation:
    """With one server, about one encoder of it. `opened` comes first."""

    encoder: Identity
    output: str

    def __init__(
        self, url: str, key: str | None = None, *, encoder: str | None = None, output: str = "recommended",
        resize: bool = False, batch: int = 32, batch_bytes: int = 16 * 1024 * 1024, concurrency: int = 4,
        timeout_s: float = 120.0, patience_s: float = 300.0, outage_s: float = 0.0,
    ) -> None:  # fmt: skip
        for name, value in (("batch", batch), ("batch_bytes", batch_bytes), ("concurrency", concurrency)):
            if value < 1:
                raise InvalidRequest(f"{name} is {value}; it must be at least 1", name)
        self.url = url.rstrip("/")
        self.concurrency = concurrency
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout_s, self._patience_s, self._outage_s = timeout_s, patience_s, outage_s
        self._batch, self._batch_bytes, self._resize = batch, batch_bytes, resize
        self._wanted, self._wanted_output = encoder, output
        self._transform: Transform | None = None
        self._numbers = 0

    def connect(self, kind: Callable[..., H]) -> H:
        """The connections to the server. Raises InvalidRequest where its URL is none."""
        try:
            return kind(base_url=self.url, headers=self._headers, timeout=self._timeout_s)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise InvalidRequest(f"{self.url!r}: {error}", "server") from None

    def opened(self) -> Steps[None]:
        """Learn which encoder it is. Raises NotFound (encoder), InvalidRequest (output), and what `_ask` raises."""
        outage_s, self._outage_s = self._outage_s, 0.0  # an address where nobody is, is said at once
        found = self._pick((yield from self.encoders()))
        self._outage_s = outage_s
        self.encoder = Identity(found["name"], found["sha256"])
        wanted = self._wanted_output
        self.output = found["manifest"]["recommended"] if wanted == "recommended" else wanted
        if self.output not in found["outputs"]:
            raise InvalidRequest(f"encoder {found['name']!r} has no output {wanted!r}", "output")
        (self._numbers,) = found["outputs"][self.output]
        if self._resize:
            try:
                self._transform = Transform(**found["manifest"]["transform"])
            except ValidationError as error:
                first = error.errors()[0]
                what = f"transform.{'.'.join(map(str, first['loc']))}: {first['msg']}"
                raise PatchsightError(f"{self.url}: pictures cannot be resized here: {what}") from None

    def encoders(self) -> Steps[list[dict[str, Any]]]:
        """What `GET /encoders` lists."""
        reply = yield from self._ask(Call("GET", "/encoders"))
        try:
            encoders: list[dict[str, Any]] = reply.json()["encoders"]
        except (ValueError, KeyError, TypeError):
            raise PatchsightError(f"{self.url}: this is no patchsight server") from None
        return encoders

    def _pick(self, encoders: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for encoder in encoders:
            if encoder["name"] == self._wanted or (self._wanted is None and encoder["default"]):
                return encoder
        names = ", ".join(encoder["name"] for encoder in encoders)
        raise NotFound(f"{self.url} has no encoder {self._wanted!r}; it has {names}", "encoder")

    def batches(self, pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
        """Cut by number and by bytes."""
        side = self._transform.crop if self._transform else None
        return batches(pictures, self._batch, self._batch_bytes, side)

    def stacked(self, rows: Sequence[Row]) -> Values:
        """`(N, D)`. Raises the first image's error, `param` names the image."""
        for i, row in enumerate(rows):
            if isinstance(row, PatchsightError):
                row.param = f"images[{i}]"
                raise row
        return np.stack(rows) if rows else np.empty((0, self._numbers), np.float32)  # type: ignore[arg-type]

    def embed(self, pictures: Sequence[Picture]) -> Steps[list[Row]]:
        """One row per picture, in order."""
        images = yield from encoded_all(pictures, self._transform)
        good = [image for image in images if isinstance(image, bytes)]
        rows = iter((yield from self._embed(good)) if good else ())
        return [image if isinstance(image, PatchsightError) else next(rows) for image in images]

    def _embed(self, images: Sequence[bytes]) -> Steps[list[Row]]:
        query = {"outputs": self.output, "normalize": "false"}
        try:
            reply = yield from self._ask(self._about("/embed", images, NPY, **query))
        except PatchsightError as error:
            about_one = (error.param or "").startswith("images[")
            if not about_one and not isinstance(error, TooLarge):
                raise
            if len(images) == 1:
                return [error]
            if not about_one:  # the server allows fewer images or bytes than we thought
                middle = len(images) // 2
                return (yield from self._embed(images[:middle])) + (yield from self._embed(images[middle:]))
            # A binary reply fails as a whole; JSON says it image by image.
            content = (yield from self._ask(self._about("/embed", images, JSON, **query))).json()
            self._check(content["encoder"]["sha256"])
            return [self._row(result) for result in content["results"]]
        return list(self._array(reply, len(images)))

    def attention(self, picture: Picture, head: str, mass: float | None) -> Steps[Values]:
        """The map `(h, w)` of one picture."""
        images = good((yield from encoded_all([picture], self._transform)))
        query = {"head": head} | ({} if mass is None else {"mass": str(mass)})
        return self._array((yield from self._ask(self._about("/attention", images, NPY, **query))))

    def _ask(self, call: Call) -> Steps[httpx.Response]:
        return ask(call, self.url, self._patience_s, self._outage_s)

    def _about(self, path: str, images: Sequence[bytes], accept: str, **query: str) -> Call:
        fitted = {"fitted": "true"} if self._transform else {}
        return Call("POST", path, {"encoder": self.encoder.name, **fitted, **query}, accept, images)

    def _array(self, reply: httpx.Response, rows: int | None = None) -> Values:
        self._check(reply.headers.get("X-Encoder-Sha256"))
        array = np.load(io.BytesIO(reply.content), allow_pickle=False)
        if rows is not None and array.shape != (rows, self._numbers):
            raise PatchsightError(f"{self.url}: replied with {array.shape} for {rows} images")
        values: Values = array.astype(np.float32)
        return values

    def _row(self, result: dict[str, Any]) -> Row:
        if "error" in result:
            return named(**result["error"])
        # Shortest decimal digits of a float32 read back give just that float32.
        return np.array(result[self.output], dtype=np.float32)

    def _check(self, sha256: str | None) -> None:
        if sha256 != self.encoder.sha256:
            raise Conflict(f"{self.url}: encoder {self.encoder.name!r} was exchanged during the work")


def encoded_all(pictures: Sequence[Picture], transform: Transform | None) -> Steps[list[bytes | PatchsightError]]:
    """One per picture, in order."""

    def one(picture: Picture) -> bytes | PatchsightError:
        try:
            return encoded(picture, transform)
        except PatchsightError as error:
            return error

    images: list[bytes | PatchsightError] = yield Work(lambda: [one(picture) for picture in pictures])
    return images


def good(images: Sequence[bytes | PatchsightError]) -> list[bytes]:
    """Raises the first error among them."""
    for image in images:
        if isinstance(image, PatchsightError):
            raise image
    return [image for image in images if isinstance(image, bytes)]
