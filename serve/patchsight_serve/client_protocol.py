"""What a client says to a server and makes of its answers, without a socket: generators that yield a `Call`, a `Wait`
or a `Work`, are sent what came of it, and return the result. `client` and `async_client` do what they yield."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import httpx
import numpy as np
import orjson
from pydantic import ValidationError

from patchsight_serve.client_images import Picture, batches, cut, encoded, weight
from patchsight_serve.client_steps import JSON, NPY, Call, Steps, Work, ask, named
from patchsight_serve.encoder import Values
from patchsight_serve.errors import Conflict, InvalidRequest, NotFound, PatchsightError, TooLarge
from patchsight_serve.group import Cluster, Group, LabelCount, Member, Typical
from patchsight_serve.item import Added, Identity, Neighbor, RegionNeighbor
from patchsight_serve.manifest import Transform

H = TypeVar("H", httpx.Client, httpx.AsyncClient)
Row = Values | PatchsightError  # float32 (D,), or what is wrong with the image
New = tuple[Picture, Mapping[str, Any]]  # for a gallery, with `id`, `label` and `metadata`, as far as it has them


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
    outage_s: float  # that one is repeated for while the server is not there: 0, which is once


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
        found = self._pick((yield from self.encoders()))
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
        images = yield from _encoded(pictures, self._transform)
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
        images = _good((yield from _encoded([picture], self._transform)))
        query = {"head": head} | ({} if mass is None else {"mass": str(mass)})
        return self._array((yield from self._ask(self._about("/attention", images, NPY, **query))))

    def new_batches(self, images: Iterable[New]) -> Iterator[list[New]]:
        """Cut by number and by bytes."""
        return cut(images, self._batch, self._batch_bytes, lambda new: weight(new[0]))

    def add(self, images: Sequence[New], query: Mapping[str, object]) -> Steps[list[Added | PatchsightError]]:
        """To a gallery: one result per image, in order."""
        data = yield from _encoded([picture for picture, _ in images], None)
        good = [(d, item) for d, (_, item) in zip(data, images, strict=True) if isinstance(d, bytes)]
        results = iter((yield from self._add(good, query)) if good else ())
        return [d if isinstance(d, PatchsightError) else next(results) for d in data]

    def _add(
        self, images: Sequence[tuple[bytes, Mapping[str, Any]]], query: Mapping[str, object]
    ) -> Steps[list[Added | PatchsightError]]:
        items = orjson.dumps([item for _, item in images]).decode()
        call = Call("POST", "/gallery/images", _said(query), JSON, [data for data, _ in images], {"items": items})
        try:
            results = (yield from self._ask(call)).json()["results"]
        except PatchsightError as error:
            if len(images) == 1 and _is_about_image(error):
                return [error]
            if not isinstance(error, TooLarge):
                raise
            middle = len(images) // 2  # the server allows fewer images or bytes than we thought
            return (yield from self._add(images[:middle], query)) + (yield from self._add(images[middle:], query))
        return [named(**r["error"]) if "error" in r else Added(r["id"], r["created"]) for r in results]

    def gallery(self, query: Mapping[str, object]) -> Steps[dict[str, Any]]:
        """What `GET /gallery` tells."""
        found: dict[str, Any] = (yield from self._ask(Call("GET", "/gallery", _said(query)))).json()
        return found

    def page(self, query: Mapping[str, object]) -> Steps[dict[str, Any]]:
        """What `GET /gallery/images` tells."""
        found: dict[str, Any] = (yield from self._ask(Call("GET", "/gallery/images", _said(query)))).json()
        return found

    def neighbors(self, picture: Picture | str, by_id: bool, query: Mapping[str, object]) -> Steps[list[Neighbor]]:
        """Of a picture, or of the indexed image of that id."""
        said = _said(query)
        if by_id:
            call = Call("GET", "/neighbors", said | {"id": str(picture)})
        else:
            call = Call("POST", "/neighbors", said, JSON, _good((yield from _encoded([picture], None))))
        return [Neighbor(**found) for found in (yield from self._ask(call)).json()["neighbors"]]

    def neighbors_each(
        self, pictures: Sequence[Picture], query: Mapping[str, object]
    ) -> Steps[list[list[Neighbor] | PatchsightError]]:
        """One result per picture, in order."""
        results: list[list[Neighbor] | PatchsightError] = []
        for picture in pictures:
            try:
                results.append((yield from self.neighbors(picture, False, query)))
            except PatchsightError as error:
                if not _is_about_image(error):
                    raise
                results.append(error)
        return results

    def region(
        self, picture: Picture | str, by_id: bool, box: Sequence[float], query: Mapping[str, object]
    ) -> Steps[list[RegionNeighbor]]:
        """Images that contain a region of a picture, or of the indexed image of that id."""
        said = _said(query) | {"box": ",".join(str(float(edge)) for edge in box)}
        if by_id:
            call = Call("GET", "/neighbors/region", said | {"id": str(picture)})
        else:
            call = Call("POST", "/neighbors/region", said, JSON, _good((yield from _encoded([picture], None))))
        found = (yield from self._ask(call)).json()["neighbors"]
        return [RegionNeighbor(**{**neighbor, "box": tuple(neighbor["box"])}) for neighbor in found]

    def duplicates(self, query: Mapping[str, object]) -> Steps[list[Group]]:
        """Page after page, up to `limit` groups if that is asked for."""
        said, groups = _said(query), []
        while True:
            page = (yield from self._ask(Call("GET", "/gallery/duplicates", said))).json()
            groups += [Group(g["id"], g["size"], [Member(**m) for m in g["members"]]) for g in page["groups"]]
            if "limit" in query or page["next_cursor"] is None:
                return groups
            said = said | {"cursor": page["next_cursor"]}

    def clusters(self, query: Mapping[str, object]) -> Steps[list[Cluster]]:
        """All of a gallery."""
        call = Call("GET", "/gallery/clusters", _said(query))
        return [
            Cluster(c["size"], [LabelCount(**count) for count in c["labels"]], [Typical(**t) for t in c["typical"]])
            for c in (yield from self._ask(call)).json()["clusters"]
        ]

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


def _said(query: Mapping[str, object]) -> dict[str, str | list[str]]:
    """As the server reads it: a filter as JSON, several labels one by one; None is not said."""
    said: dict[str, str | list[str]] = {}
    for name, value in query.items():
        if name == "filter" and isinstance(value, Mapping):
            try:
                said[name] = orjson.dumps(value).decode()
            except TypeError as error:
                raise InvalidRequest(f"filter cannot be written as JSON: {error}", "filter") from None
        elif isinstance(value, list | tuple | set | frozenset):
            if not value:  # which a query string cannot say: it would be as if nothing had been chosen
                raise InvalidRequest(f"{name} is empty: there is nothing to choose from", name)
            said[name] = [str(one) for one in value]
        elif value is not None:
            said[name] = str(value)
    return said


def _is_about_image(error: PatchsightError) -> bool:
    """Whether an error that a request with one image got is that of the image."""
    about = error.param or ""
    return about in ("id", "label", "metadata", "items") or about.startswith("images[") or isinstance(error, TooLarge)


def _encoded(pictures: Sequence[Picture], transform: Transform | None) -> Steps[list[bytes | PatchsightError]]:
    def one(picture: Picture) -> bytes | PatchsightError:
        try:
            return encoded(picture, transform)
        except PatchsightError as error:
            return error

    images: list[bytes | PatchsightError] = yield Work(lambda: [one(picture) for picture in pictures])
    return images


def _good(images: Sequence[bytes | PatchsightError]) -> list[bytes]:
    """Raises the first error among them."""
    for image in images:
        if isinstance(image, PatchsightError):
            raise image
    return [image for image in images if isinstance(image, bytes)]
