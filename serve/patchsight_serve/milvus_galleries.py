"""The galleries that are on Milvus, by name. Any number of gateways may have the same ones."""

import threading
from collections.abc import Callable
from pathlib import Path

from patchsight_serve.collection import DEFAULT, Galleries, Outline
from patchsight_serve.embedded_gallery import EmbeddedGallery
from patchsight_serve.errors import Conflict, NotFound, PatchsightError
from patchsight_serve.gallery import Gallery
from patchsight_serve.milvus_binding import Binding
from patchsight_serve.milvus_collection import alias_of, gallery_of
from patchsight_serve.milvus_connection import MilvusConnection
from patchsight_serve.milvus_facts import MilvusFacts
from patchsight_serve.milvus_gallery import MilvusGallery
from patchsight_serve.scratch import Scratch


class MilvusGalleries(Galleries):
    """Those whose collections begin with a prefix."""

    def __init__(self, uri: str, prefix: str, token: str, scratch: Path) -> None:
        """uri, token: as `MilvusConnection`. scratch: a folder for files on their way. Raises PatchsightError."""
        if not uri.startswith("http"):
            Path(uri).absolute().parent.mkdir(parents=True, exist_ok=True)
        self._connection, self._prefix = MilvusConnection(uri, token), prefix
        self._facts = MilvusFacts(self._connection, prefix)
        self._open: dict[str, MilvusGallery] = {}
        self._opening = threading.Lock()
        self.scratch = Scratch(scratch)

    def names(self) -> list[str]:
        names = (gallery_of(self._prefix, alias) for alias in self._connection.aliases())
        return sorted(name for name in names if name is not None)

    def _outline(self, name: str) -> Outline | None:
        try:
            gallery = self.get(name)
            return Outline(name, len(gallery), gallery.encoder)
        except NotFound:
            return None  # another gateway has removed it since
        except PatchsightError:
            return Outline(name, None, None)

    def exists(self, name: str) -> bool:
        return self._connection.aliased(alias_of(self._prefix, name)) is not None

    def get(self, name: str, create: bool = False) -> MilvusGallery:
        gallery = self._open.get(name)
        if gallery is not None and not gallery.ended:
            return gallery
        if not (create or name == DEFAULT or self.exists(name)):
            raise NotFound(f"no gallery {name!r}; add an image to make it", param="gallery")
        with self._opening:
            gallery = self._open.get(name)
            if gallery is None or gallery.ended:
                self._open[name] = gallery = MilvusGallery(self._binding(name), name)
            return gallery

    def _binding(self, name: str) -> Binding:
        return Binding(self._connection, self._facts, self._prefix, name)

    def delete(self, name: str) -> None:
        gallery = self.get(name)
        gallery.end(NotFound(f"no gallery {name!r}: it was removed", param="gallery"))
        # By the fact that stays the sample photos know that they are not wanted.
        self._binding(name).remove(keep=("encoder",) if name == DEFAULT else ())

    def check_free(self, name: str, replace: bool = False) -> None:  # noqa: ARG002
        """Raises Conflict."""
        raise _no_file(name)

    def publish(self, name: str, file: Path, replace: bool = False) -> Gallery:  # noqa: ARG002
        """Raises Conflict."""
        raise _no_file(name)

    def exchange(self, gallery: Gallery, make: Callable[[], EmbeddedGallery | None]) -> bool:  # noqa: ARG002
        """Raises Conflict."""
        raise _no_file(gallery.name)

    def close(self) -> None:
        self._connection.close()
        self.scratch.close()


def _no_file(name: str) -> Conflict:
    return Conflict(f"gallery {name!r} is on Milvus, which has backups of its own", param="gallery")
