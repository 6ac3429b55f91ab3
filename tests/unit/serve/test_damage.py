"""A byte of the record that flips: it is reported, or the record refused; nothing that is answered is wrong."""

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchsight_serve.embedded_gallery import EmbeddedGallery as Gallery
from patchsight_serve.errors import NotFound, PatchsightError
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import normalize

ENCODER = Identity("vit", "a" * 64)
COUNT, DIM = 60, 16
VECTORS = normalize(np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32))
IDS = [f"image-{i:02d}" for i in range(COUNT)]


def new(i: int, **changes: Any) -> NewImage:
    data = random.Random(i).randbytes(300 if i else 20_000)
    fields: dict[str, Any] = {"id": IDS[i], "label": [None, "shirt", "hat"][i % 3], "metadata": {"n": i}} | changes
    return NewImage(Item(**fields), data, b"thumb" * 10 + data[:20], VECTORS[i])


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a gallery that was closed."""
    gallery = Gallery(tmp_path_factory.mktemp("galleries") / "g")
    gallery.add([new(i) for i in range(COUNT)], ENCODER)
    gallery.close()
    return gallery.record.path


GONE = object()


def told(call: Callable[..., Any], *given: Any, **how: Any) -> Any:
    """Its answer, None where it is an error of ours, GONE where that says that there is no such image."""
    try:
        return call(*given, **how)
    except PatchsightError as error:
        said = error
    if isinstance(said, NotFound):
        return GONE
    assert "damaged" in said.message or "gallery.sqlite: " in said.message
    return None


def check(gallery: Gallery) -> None:
    """Nothing is wrong, and what is not there is told."""
    lost, labels = set[str](), [None, "shirt", "hat"]
    for i, id in enumerate(IDS):
        image = told(gallery.get, id)
        if image is GONE:
            lost.add(id)
        elif image is not None:
            assert (image.id, image.label, image.metadata) == (id, labels[i % 3], {"n": i})
            assert (gallery.vectors([id])[0] == VECTORS[i]).all()
        data = new(i).data
        assert told(gallery.original, id) in (None, GONE, data)
        assert told(gallery.thumbnail, id) in (None, GONE, new(i).thumbnail)
        found = told(gallery.neighbors, VECTORS[i], 3)
        assert found is None or all(
            n.score == pytest.approx(VECTORS[i] @ VECTORS[IDS.index(n.id)], abs=1e-6) for n in found
        )
        assert found is None or image in (None, GONE) or id in gallery.damaged or found[0].id == id
    for label in (1, 2):
        found = told(gallery.neighbors, VECTORS[0], COUNT, label=labels[label])
        assert found is None or {n.id for n in found} == set(IDS[label::3]) - lost - set(gallery.damaged)
    seen = pages(gallery)
    assert seen is None or (sorted(seen) == seen and len(set(seen)) == len(seen))
    assert seen is None or set(IDS) - lost - set(gallery.damaged) <= set(seen) <= set(IDS)
    assert len(lost) <= len(gallery.damaged)


def pages(gallery: Gallery) -> list[str] | None:
    """Ids of all pages."""
    seen, after = [], ""
    for _ in range(COUNT):
        page = told(gallery.page, after, 7)
        if page is None:
            return None
        seen += [image.id for image in page[0]]
        if page[1] is None:
            return seen
        after = page[1]
    raise AssertionError("the pages have no end")


@pytest.mark.parametrize(
    "part", [*range(6), 34, *(pytest.param(i, marks=pytest.mark.acceptance) for i in range(6, 100) if i != 34)]
)
def test_a_flipped_bit(record: Path, tmp_path: Path, part: int) -> None:
    """Anywhere: in heads of pages, where their cells are listed, in indexes, rows, vectors and pictures."""
    content, rng = record.read_bytes(), random.Random(part)
    path, refused = tmp_path / "g" / "gallery.sqlite", 0
    for _ in range(15):
        at = 4096 * rng.randrange(len(content) // 4096) + rng.randrange(rng.choice([12, 200, 4096]))
        flipped = content[at] ^ 1 << rng.randrange(8)
        print(f"byte {at}: {content[at]} is {flipped}")
        path.parent.mkdir()
        path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        gallery = told(Gallery, path.parent)
        refused += gallery is None
        if gallery is not None:
            check(gallery)
            for i, id in enumerate(IDS):  # what is lost can be added again
                if told(gallery.get, id) is GONE:
                    told(gallery.add, [new(i)], ENCODER)
            check(gallery)
            gallery.close()
        shutil.rmtree(path.parent)
    assert refused < 5


def test_ids_that_are_no_text_end_no_page(record: Path, tmp_path: Path) -> None:
    """Bytes that are no UTF-8, of which what is decoded stands elsewhere, and values of other types."""
    path = tmp_path / "g" / "gallery.sqlite"
    path.parent.mkdir()
    shutil.copy(record, path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for i in range(10, 24):
            damaged = "CAST(CAST(id AS BLOB) || x'ff' AS TEXT)" if i % 2 else "CAST(id AS BLOB)"
            damaged = "CAST(x'ff' || CAST(id AS BLOB) AS TEXT)" if i % 3 == 0 else damaged
            connection.execute(f"UPDATE images SET id = {damaged} WHERE id = ?", (IDS[i],))
    gallery = Gallery(path.parent)
    left = IDS[:10] + IDS[24:]
    assert len(gallery.damaged) == 14
    for limit in (1, 2, 7, 46, 100):
        seen, after = [], ""
        while True:
            images, more = gallery.page(after, limit)
            seen += [image.id for image in images]
            if more is None:
                break
            assert len(images) == limit
            after = more
        assert seen == left
    gallery.close()


def test_an_index_of_sqlite_is_made_anew(record: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each of the two, where it names another image than the rows do; and it is sound from then on."""
    for value, said in ((b"image-07", "index of the images' id"), (b"shirt", "index of the images' label")):
        path = tmp_path / value.decode() / "gallery.sqlite"
        path.parent.mkdir()
        content = bytearray(record.read_bytes())
        page = _index_page(record, said.rpartition(" ")[2])
        at = content.index(value, page, page + 4096)
        content[at + len(value) - 1] ^= 0x40
        path.write_bytes(content)
        caplog.clear()
        gallery = Gallery(path.parent)
        assert said in caplog.text
        assert gallery.damaged == []
        check(gallery)
        assert [n.id for n in gallery.neighbors(VECTORS[7], 1, label="shirt")] == [IDS[7]]
        gallery.close()
        caplog.clear()
        Gallery(path.parent).close()
        assert caplog.text == ""


def _index_page(record: Path, column: str) -> int:
    """Where the first page of an index begins."""
    name = {"id": "sqlite_autoindex_images_1", "label": "images_by_label"}[column]
    with closing(sqlite3.connect(record)) as connection:
        ((page,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,))
    return int(page - 1) * 4096
