"""All galleries of a server: one folder each under `<state_dir>/galleries`, opened when first needed."""

import threading
from pathlib import Path

from patchsight_serve.errors import NotFound
from patchsight_serve.gallery import Gallery
from patchsight_serve.index import EXACT_LIMIT
from patchsight_serve.item import check_gallery

DEFAULT = "default"


class Galleries:
    """The galleries in a folder, by name. Every method may be called from any thread; opening a big gallery takes
    seconds, and holds up nobody who uses another."""

    def __init__(self, folder: Path, keep_originals: bool = True, exact_limit: int = EXACT_LIMIT) -> None:
        self._folder = folder
        self._keep_originals = keep_originals
        self._exact_limit = exact_limit
        self._open: dict[str, Gallery] = {}
        self._opening = threading.Lock()

    def names(self) -> list[str]:
        """Names of the galleries that exist."""
        return sorted(path.parent.name for path in self._folder.glob("*/gallery.sqlite"))

    def exists(self, name: str) -> bool:
        """Whether there is a gallery of that name, even an empty one."""
        return (self._folder / check_gallery(name) / "gallery.sqlite").is_file()

    def get(self, name: str, create: bool = False) -> Gallery:
        """The gallery of that name; the default one is always there. Raises NotFound, and what `Gallery` raises."""
        if name in self._open:
            return self._open[name]
        with self._opening:
            if name in self._open:
                return self._open[name]
            if not (create or name == DEFAULT or self.exists(name)):
                raise NotFound(f"no gallery {name!r}; add an image to make it", param="gallery")
            folder = self._folder / check_gallery(name)
            self._open[name] = Gallery(folder, self._keep_originals, self._exact_limit)
            return self._open[name]

    def close(self) -> None:
        """Let go of all files."""
        with self._opening:
            while self._open:
                self._open.popitem()[1].close()


class NoGalleries(Galleries):
    """Of a server of several processes: a gallery is in the memory of one, and the others would give wrong answers."""

    def __init__(self, processes: int) -> None:
        super().__init__(Path())
        self._processes = processes

    def get(self, name: str, create: bool = False) -> Gallery:  # noqa: ARG002
        """Raises NotFound."""
        raise NotFound(
            f"gallery {name!r}: there are no galleries on a server of {self._processes} processes; start it with "
            "--processes 1",
            param="gallery",
        )
