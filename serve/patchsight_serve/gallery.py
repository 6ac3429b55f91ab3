"""What every gallery does: images with vectors of one encoder, kept durably, searched by vector. Which of them keeps
what where is its own affair; knows no HTTP."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

from patchsight_serve.errors import Conflict, InvalidRequest, NotFound, PatchsightError
from patchsight_serve.filters import Filter
from patchsight_serve.index import IndexState
from patchsight_serve.item import Changes, Identity, Image, Neighbor, NewImage, NewVector
from patchsight_serve.nearest import F32, I64, normalize
from patchsight_serve.row import Row

MAX_K = 1000


class Gallery(ABC):
    """One named gallery. Every method may be called from any thread, and may take as long as the disk or the network
    does; none belongs on an event loop."""

    name: str
    damaged: list[str]  # ids whose rows failed their checksum; they are left out of everything
    busy: bool  # with a write that takes seconds or more

    @abstractmethod
    def __len__(self) -> int:
        """Number of indexed images."""

    @property
    @abstractmethod
    def index(self) -> IndexState:
        """How searches are answered right now."""

    @property
    @abstractmethod
    def encoder(self) -> Identity | None:
        """The encoder this gallery is bound to; an empty gallery is free."""

    @property
    @abstractmethod
    def dim(self) -> int | None:
        """Numbers per vector; None while it is empty."""

    def require(self, encoder: Identity) -> None:
        """Raises Conflict unless vectors of that encoder belong here."""
        bound = self.encoder
        if bound is not None and bound != encoder:
            raise Conflict(
                f"gallery {self.name!r} holds vectors of encoder {bound.name!r} (sha256 {bound.sha256[:12]}…), not of "
                f"{encoder.name!r} (sha256 {encoder.sha256[:12]}…); use another gallery for it",
                param="encoder",
            )

    @abstractmethod
    def holds(self, items: Sequence[tuple[str, str]]) -> list[bool]:
        """For each (id, sha256) whether just that image is indexed, so that it need not be embedded again."""

    @abstractmethod
    def add(
        self, images: Sequence[NewImage], encoder: Identity, replace: bool = False, facts: dict[str, str] | None = None
    ) -> list[bool | PatchsightError]:
        """Add images, durably once this returns. For each: True if it is new, False if it was there already, or
        Conflict if its id has other bytes.

        An image that is there already keeps its label and metadata, unless `replace` is set. facts: stored with the
        images, or not at all. Raises Conflict (another encoder) and StorageFull; then nothing was stored.
        """

    @abstractmethod
    def add_vectors(
        self, batches: Callable[[], Iterable[Sequence[NewVector]]], encoder: Identity, replace: bool = False
    ) -> dict[str, int]:
        """Vectors by the thousand, without their pictures. How many were `created`, `replaced` and `unchanged`.

        batches: gives them, from the first on with each call; no id is in them twice. What is there already, by sha256
        or by its vector, is unchanged; with `replace` it gets the label and metadata, and keeps its picture. Readers go
        on meanwhile; other writers wait, and `busy` tells of it.

        Raises Conflict (another encoder, or another image under an id, without `replace`), InvalidRequest (vectors of
        another size), StorageFull, and what `batches` raises; then nothing was stored.
        """

    @abstractmethod
    def all_rows(
        self, left: threading.Event, chunk: int
    ) -> AbstractContextManager[tuple[Identity | None, Iterator[list[Row]]]]:
        """For a block: the encoder, and all sound rows as they were at one moment, in chunks. It holds up nobody, and
        ends with an error once `left` is set."""

    @abstractmethod
    def get(self, id: str) -> Image:
        """Raises NotFound."""

    @abstractmethod
    def page(self, after: str = "", limit: int = 100) -> tuple[list[Image], str | None]:
        """Up to `limit` images in the order of their ids, those behind the id `after`; and what to pass as `after` for
        the rest, None at the end."""

    @abstractmethod
    def thumbnail(self, id: str) -> bytes:
        """JPEG bytes. Raises NotFound, also where the image came without its picture."""

    @abstractmethod
    def original(self, id: str) -> bytes:
        """The encoded image as it came. Raises NotFound, also where it was not kept; PatchsightError if it is
        damaged."""

    @abstractmethod
    def patch(self, id: str, changes: Changes) -> Image:
        """Change label or metadata, durably. Raises NotFound, InvalidRequest, StorageFull."""

    @abstractmethod
    def delete(self, id: str) -> None:
        """Remove an image, also one whose row is damaged, durably. Raises NotFound, StorageFull."""

    @abstractmethod
    def vectors(self, ids: Sequence[str]) -> F32:
        """Unit vectors float32 `(N, D)` of indexed images. Raises NotFound."""

    @abstractmethod
    def neighbors(
        self,
        query: F32,
        k: int = 10,
        *,
        leave_out: Collection[str] = (),
        label: str | Collection[str] | None = None,
        filter: Filter | None = None,
        min_score: float = -1.0,
    ) -> list[Neighbor]:
        """The `k` most similar images by cosine, best first, equal scores in the order of their ids; of a large
        gallery, those of them that an approximate index finds.

        query: float `(D,)`, of any length but 0. leave_out: ids not to be found. label: only images of this label, or
        of one of these. filter: only images with such metadata. Where k of them exist, k are found. min_score: only
        scores from this on.

        Raises:
            InvalidRequest: k outside 1 to 1000, too many labels, or a query of another size, of length 0, or with NaN.
        """

    @abstractmethod
    def fact(self, name: str) -> str | None:
        """A fact that was stored with `add`."""

    @abstractmethod
    def keys(self) -> I64:
        """Keys of all indexed images, int64 `(N,)`, ascending. A key names one vector for ever."""

    @abstractmethod
    def snapshot(self) -> tuple[I64, F32]:
        """Those keys and their unit vectors float32 `(N, D)`, a copy; writers hardly wait for it."""

    @abstractmethod
    def names(self, keys: I64) -> dict[int, tuple[str, str]]:
        """Id and sha256 of those keys that are still there."""

    @abstractmethod
    def images(self, keys: I64) -> dict[int, Image]:
        """The images of those keys that are still there and intact."""

    @abstractmethod
    def labels(self) -> Iterator[list[tuple[int, str]]]:
        """Keys and labels of all images that have one, in chunks."""

    @abstractmethod
    def close(self) -> None:
        """Wait for the writer, then let go of all that it holds."""

    @abstractmethod
    def end(self, error: PatchsightError) -> None:
        """As `close`, for good: whoever still holds this gallery, and asks it for something, gets `error`."""


def checked_query(query: F32, k: int) -> F32:
    """The query `(D,)` at length 1. Raises InvalidRequest for one without direction, or k out of range."""
    if not 1 <= k <= MAX_K:
        raise InvalidRequest(f"k is {k}, it must be 1 to {MAX_K}", param="k")
    return normalize(query)


def check_size(vector: F32, dim: int | None, param: str) -> None:
    """Raises InvalidRequest unless a gallery, whose vectors have `dim` values (None: it has none), takes the vector."""
    if dim not in (None, vector.size):
        raise InvalidRequest(f"a vector has {vector.size} values, those of the gallery have {dim}", param=param)


def chosen_by(label: str | Collection[str] | None, filter: Filter | None) -> Filter | None:
    """One filter for both; None chooses from all."""
    if label is None:
        return filter
    labels = Filter.labels([label] if isinstance(label, str) else label)
    return labels & filter if filter else labels


def unknown(id: str, gallery: str) -> NotFound:
    """The error of an id that is not there."""
    return NotFound(f"no image {id!r} in gallery {gallery!r}", param="id")


def other_bytes(id: str) -> Conflict:
    """The error of an id that is taken."""
    return Conflict(f"id {id!r} is taken by an image with other bytes; replace=true replaces it", param="id")
