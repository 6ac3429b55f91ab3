"""The embedded galleries of a server: one folder each under `<state_dir>/galleries`, opened when first needed."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path

from patchsight_serve.collection import DEFAULT, Galleries, Outline
from patchsight_serve.durable import sync
from patchsight_serve.embedded_gallery import EmbeddedGallery
from patchsight_serve.errors import Conflict, NotFound, PatchsightError, Superseded
from patchsight_serve.gallery import Gallery
from patchsight_serve.index import EXACT_LIMIT
from patchsight_serve.item import check_gallery
from patchsight_serve.record import Record
from patchsight_serve.record_file import lock_out_others, outlined
from patchsight_serve.scratch import Scratch, told

FILE = "gallery.sqlite"
TURNS = 64


class EmbeddedGalleries(Galleries):
    """Those in a folder, of this process alone. Opening a big one takes seconds, and holds up nobody who uses
    another."""

    def __init__(self, folder: Path, keep_originals: bool = True, exact_limit: int = EXACT_LIMIT) -> None:
        self._folder = folder
        self._keep_originals = keep_originals
        self._exact_limit = exact_limit
        self._open: dict[str, EmbeddedGallery] = {}
        # Who opens, exchanges or removes a gallery waits for his turn. Several names share one lock: names are many.
        self._turns = [threading.RLock() for _ in range(TURNS)]
        self.scratch = Scratch(folder / ".scratch")

    def names(self) -> list[str]:
        return sorted(path.parent.name for path in self._folder.glob(f"*/{FILE}"))

    def _outline(self, name: str) -> Outline | None:
        """Of one that is not open by its file: its vectors stay where they are."""
        if (gallery := self._open.get(name)) is None:
            with self._turn(name):
                if (gallery := self._open.get(name)) is None:
                    count, encoder = outlined(self._folder / name / FILE)
                    return Outline(name, count, encoder) if self.exists(name) else None
        return Outline(name, len(gallery), gallery.encoder)

    def held(self) -> tuple[int, int]:
        """How many are open, and how many images they have."""
        galleries = list(self._open.values())
        return len(galleries), sum(len(gallery) for gallery in galleries)

    def exists(self, name: str) -> bool:
        return (self._folder / check_gallery(name) / FILE).is_file()

    def get(self, name: str, create: bool = False) -> EmbeddedGallery:
        if (gallery := self._open.get(name)) is not None:
            return gallery
        self._expect(name, create)
        with self._turn(name):
            if name not in self._open:
                self._expect(name, create)  # it may have been removed meanwhile
                folder = self._folder / check_gallery(name)
                self._open[name] = EmbeddedGallery(folder, self._keep_originals, self._exact_limit)
            return self._open[name]

    def _expect(self, name: str, create: bool) -> None:
        if not (create or name == DEFAULT or self.exists(name)):
            raise NotFound(f"no gallery {name!r}; add an image to make it", param="gallery")

    def _turn(self, name: str) -> AbstractContextManager[object]:
        return self._turns[hash(name) % TURNS]

    def delete(self, name: str) -> None:
        gone = NotFound(f"no gallery {name!r}: it was removed", param="gallery")
        with self.scratch.folder() as folder:  # whose end takes the files along
            if name == DEFAULT:
                with self._turn(name):
                    self._put(name, _emptied(self.get(name), folder / FILE), gone)
                return
            with self._turn(name):
                self._expect(name, create=False)
                self._end(name, gone)
                with self._alone(name):
                    (self._folder / name).rename(folder / name)
                    sync(self._folder)

    def check_free(self, name: str, replace: bool = False) -> None:
        if not self.exists(name) or replace or (name == DEFAULT and not len(self.get(name))):
            return
        raise Conflict(f"there is a gallery {name!r}; replace=true replaces it", param="gallery")

    def publish(self, name: str, file: Path, replace: bool = False) -> EmbeddedGallery:
        with self._turn(name):
            self.check_free(name, replace)
            self._put(name, file, Superseded(f"gallery {name!r} was replaced meanwhile; ask again", param="gallery"))
            return self.get(name)

    def exchange(self, gallery: Gallery, make: Callable[[], EmbeddedGallery | None]) -> bool:
        with self._turn(gallery.name):
            heir = make()
            if heir is not None:
                self._open[gallery.name] = heir
            return heir is not None

    def _put(self, name: str, file: Path, error: PatchsightError) -> None:
        """In the name's turn: the file into its place. Whoever holds the gallery of before gets the error."""
        folder = self._folder / check_gallery(name)
        with told(f"gallery {name!r}"):
            sync(file)
            folder.mkdir(parents=True, exist_ok=True)
        self._end(name, error)
        with self._alone(name):
            for log in ("-wal", "-shm"):  # they would be taken for the new file's
                (folder / f"{FILE}{log}").unlink(missing_ok=True)
            file.replace(folder / FILE)
            sync(folder)
            sync(self._folder)

    def _end(self, name: str, error: PatchsightError) -> None:
        """In the name's turn: let go of the gallery, with all that was committed in its one file."""
        gallery = self._open.pop(name, None)
        if gallery is not None:
            gallery.end(error)
        elif self.exists(name):
            try:
                Record(self._folder / name / FILE).close()
            except Conflict:
                raise
            except PatchsightError:
                pass  # it cannot be read: there is nothing to keep

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """No other process opens the gallery during the block. Raises Conflict where one has it open."""
        with closing(lock_out_others(self._folder / name / "gallery.lock")):
            yield

    def close(self) -> None:
        with ExitStack() as stack:
            for turn in self._turns:
                stack.enter_context(turn)
            while self._open:
                self._open.popitem()[1].close()
        self.scratch.close()


def _emptied(gallery: EmbeddedGallery, path: Path) -> Path:
    """A record without images, at `path`. It is known to have held some: the sample photos stay away."""
    record = Record(path)
    with record.transaction():
        if (encoder := gallery.fact("encoder")) is not None:
            record.set_fact("encoder", encoder)
    record.close()
    return path
