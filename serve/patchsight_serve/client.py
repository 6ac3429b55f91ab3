"""Many images to embeddings, through a server's `POST /embed`."""

import io
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np

from patchsight_serve import errors
from patchsight_serve.errors import Conflict, InvalidRequest, NotFound, Overloaded, PatchsightError, TooLarge
from patchsight_serve.item import Identity
from patchsight_serve.nearest import F32

_BY_CODE = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PatchsightError)
}


class Client:
    """A running server. Images go in batches, several at a time; a server that is busy (429) is asked again when it
    says, for up to `patience_s` seconds a batch.

    url: as in `http://127.0.0.1:8000`. key: of its `PATCHSIGHT_API_KEYS`. encoder: None for the server's default.
    output: `recommended`, `cls`, `mean` or `both`.

    Raises:
        NotFound: the server has no such encoder. InvalidRequest: the encoder has no such output.
        Unauthorized: it wants another key. PatchsightError: it cannot be reached, or is no patchsight server.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        encoder: str | None = None,
        output: str = "recommended",
        batch: int = 32,
        batch_bytes: int = 16 * 1024 * 1024,
        concurrency: int = 4,
        timeout_s: float = 120.0,
        patience_s: float = 300.0,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url = url.rstrip("/")
        self._batch, self._batch_bytes, self._concurrency, self._patience_s = (
            batch,
            batch_bytes,
            concurrency,
            patience_s,
        )
        try:
            self._http = httpx.Client(base_url=self._url, headers=headers, timeout=timeout_s)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise InvalidRequest(f"{url!r}: {error}", "server") from None
        try:
            found = self._describe(encoder)
        except BaseException:
            self.close()
            raise
        self.encoder = Identity(found["name"], found["sha256"])
        self.output = found["manifest"]["recommended"] if output == "recommended" else output
        if self.output not in found["outputs"]:
            self.close()
            raise InvalidRequest(f"encoder {found['name']!r} has no output {output!r}", "output")

    def embed(self, images: Sequence[bytes]) -> F32:
        """Encoded images to float32 `(N, D)`, as the graph gives them. Raises the first image's error, if any."""
        rows: list[F32] = []
        for i, row in enumerate(self.embed_each(images)):
            if isinstance(row, PatchsightError):
                row.param = f"images[{i}]"
                raise row
            rows.append(row)
        return np.stack(rows) if rows else np.empty((0, 0), np.float32)

    def embed_each(self, images: Iterable[bytes]) -> Iterator[F32 | PatchsightError]:
        """For each image, in order, its embedding float32 `(D,)`, or what is wrong with the image.

        Raises Overloaded, Conflict (the server's encoder was exchanged meanwhile), and what stops all of it.
        """
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="client") as pool:
            ahead: deque[Future[list[F32 | PatchsightError]]] = deque()
            try:
                for batch in self._batches(images):
                    ahead.append(pool.submit(self._post, batch))
                    if len(ahead) > self._concurrency:
                        yield from ahead.popleft().result()
                while ahead:
                    yield from ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _batches(self, images: Iterable[bytes]) -> Iterator[list[bytes]]:
        """Cut by number and by bytes."""
        batch: list[bytes] = []
        size = 0
        for image in images:
            if batch and (len(batch) == self._batch or size + len(image) > self._batch_bytes):
                yield batch
                batch, size = [], 0
            batch.append(image)
            size += len(image)
        if batch:
            yield batch

    def _post(self, batch: list[bytes]) -> list[F32 | PatchsightError]:
        reply = self._ask(batch, "application/x-npy")
        if reply.is_success:
            vectors = np.load(io.BytesIO(reply.content), allow_pickle=False)
            if vectors.ndim != 2 or len(vectors) != len(batch):
                raise PatchsightError(f"{self._url}: replied with {vectors.shape} for {len(batch)} images")
            self._check(reply.headers.get("X-Encoder-Sha256"))
            return list(vectors.astype(np.float32))
        error = _error(reply)
        about_one = (error.param or "").startswith("images[")
        if about_one and len(batch) == 1:
            return [error]
        if about_one:  # a binary reply fails as a whole; JSON says it image by image
            reply = self._ask(batch, "application/json")
            if not reply.is_success:
                raise _error(reply)
            content = reply.json()
            self._check(content["encoder"]["sha256"])
            return [self._row(result) for result in content["results"]]
        if isinstance(error, TooLarge) and len(batch) > 1:  # the server allows fewer images or bytes than we thought
            middle = len(batch) // 2
            return self._post(batch[:middle]) + self._post(batch[middle:])
        if isinstance(error, TooLarge):
            return [error]
        raise error

    def _row(self, result: dict[str, Any]) -> F32 | PatchsightError:
        if "error" in result:
            return _named(**result["error"])
        # Shortest decimal digits of a float32 read back give just that float32.
        return np.array(result[self.output], dtype=np.float32)

    def _ask(self, batch: list[bytes], accept: str) -> httpx.Response:
        """One request, repeated while the server is busy."""
        query = {"encoder": self.encoder.name, "outputs": self.output, "normalize": "false"}
        files = [("images", (f"{i}", data, "application/octet-stream")) for i, data in enumerate(batch)]
        end = time.monotonic() + self._patience_s
        while True:
            reply = self._request("POST", "/embed", params=query, files=files, headers={"Accept": accept})
            if reply.status_code != Overloaded.status or time.monotonic() > end:
                return reply
            wait = reply.headers.get("Retry-After", "1")
            time.sleep(min(int(wait), 60) if wait.isdecimal() else 1)

    def _describe(self, name: str | None) -> dict[str, Any]:
        reply = self._request("GET", "/encoders")
        if not reply.is_success:
            raise _error(reply)
        try:
            encoders: list[dict[str, Any]] = reply.json()["encoders"]
        except (ValueError, KeyError, TypeError):
            raise PatchsightError(f"{self._url} is no patchsight server") from None
        for encoder in encoders:
            if encoder["name"] == name or (name is None and encoder["default"]):
                return encoder
        raise NotFound(
            f"{self._url} has no encoder {name!r}; it has {', '.join(e['name'] for e in encoders)}", "encoder"
        )

    def _request(self, method: str, path: str, **what: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **what)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise PatchsightError(f"{self._url}: {reason}") from error

    def _check(self, sha256: str | None) -> None:
        if sha256 != self.encoder.sha256:
            raise Conflict(f"{self._url}: encoder {self.encoder.name!r} was exchanged during the work")


def _error(reply: httpx.Response) -> PatchsightError:
    """The server's own words, or what came instead."""
    try:
        return _named(**reply.json()["error"])
    except (ValueError, KeyError, TypeError):
        return PatchsightError(f"{reply.url}: status {reply.status_code} and no error of a patchsight server")


def _named(code: str, message: str, param: str | None = None, **_: Any) -> PatchsightError:
    kind: type[PatchsightError] = _BY_CODE.get(code, PatchsightError)
    return kind(message) if kind is Overloaded else kind(message, param)
