"""The galleries of a server, by name. Which of them exist, and where, is for those who keep them to say."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from patchsight_serve.embedded_gallery import EmbeddedGallery
from patchsight_serve.errors import NotFound
from patchsight_serve.gallery import Gallery
from patchsight_serve.item import Identity
from patchsight_serve.scratch import Scratch

DEFAULT = "default"


@dataclass(frozen=True)
class Outline:
    """A gallery among others. count: its images, None where it cannot be read. encoder: None while it is empty."""

    name: str
    count: int | None
    encoder: Identity | None


class Galleries(ABC):
    """Every method may be called from any thread."""

    scratch: Scratch

    @abstractmethod
    def names(self) -> list[str]:
        """Names of the galleries that exist."""

    def outlines(self) -> list[Outline]:
        """Each gallery in short, in the order of their names. None is opened for it that would take long."""
        return [outline for name in self.names() if (outline := self._outline(name)) is not None]

    @abstractmethod
    def _outline(self, name: str) -> Outline | None:
        """One of `names`; None where it has been removed since."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a gallery of that name, even an empty one."""

    @abstractmethod
    def get(self, name: str, create: bool = False) -> Gallery:
        """The gallery of that name; the default one is always there. Raises NotFound, and what `Gallery` raises."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a gallery for good; the default one is emptied, and takes images of any encoder. Requests that are at
        it get NotFound from now on.

        A kill leaves all of it or nothing that could be asked for. Raises NotFound, Conflict where another process has
        it open, StorageFull where the default one cannot be exchanged.
        """

    @abstractmethod
    def check_free(self, name: str, replace: bool = False) -> None:
        """Raises Conflict where a gallery of that name is in the way of another; an empty default one is not."""

    @abstractmethod
    def publish(self, name: str, file: Path, replace: bool = False) -> Gallery:
        """Make a record, a file in a folder of `scratch`, the gallery of that name. Requests that are at the old one
        get Superseded from now on.

        A kill leaves the old gallery or the new one, whole. Raises as `check_free`; Conflict where another process has
        it open; what `Gallery` raises.
        """

    @abstractmethod
    def exchange(self, gallery: Gallery, make: Callable[[], EmbeddedGallery | None]) -> bool:
        """Have what `make` returns in the place of an open gallery, unless that is None. Whether it is."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all files and connections."""


class NoGalleries(Galleries):
    """Of a server of several processes: a gallery is in the memory of one, and the others would give wrong answers."""

    def __init__(self, processes: int) -> None:
        self.scratch = Scratch(Path(".scratch"))
        self._processes = processes

    def names(self) -> list[str]:
        """None."""
        return []

    def _outline(self, name: str) -> Outline | None:
        """Raises NotFound."""
        raise self._none(name)

    def exists(self, name: str) -> bool:
        """Raises NotFound."""
        raise self._none(name)

    def get(self, name: str, create: bool = False) -> Gallery:  # noqa: ARG002
        """Raises NotFound."""
        raise self._none(name)

    def delete(self, name: str) -> None:
        """Raises NotFound."""
        raise self._none(name)

    def check_free(self, name: str, replace: bool = False) -> None:  # noqa: ARG002
        """Raises NotFound."""
        raise self._none(name)

    def publish(self, name: str, file: Path, replace: bool = False) -> Gallery:  # noqa: ARG002
        """Raises NotFound."""
        raise self._none(name)

    def exchange(self, gallery: Gallery, make: Callable[[], EmbeddedGallery | None]) -> bool:  # noqa: ARG002
        """Raises NotFound."""
        raise self._none(gallery.name)

    def close(self) -> None:
        """There is nothing to let go of."""

    def _none(self, name: str) -> NotFound:
        return NotFound(
            f"gallery {name!r}: there are no galleries on a server of {self._processes} processes; start it with "
            "--processes 1, or with a Milvus server as --gallery",
            param="gallery",
        )
