"""The index's file: what is found with it is what is found without, and what is wrong with it is said."""

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchsight_serve import index as index_module
from patchsight_serve import index_file
from patchsight_serve.embedded_gallery import EmbeddedGallery as Gallery
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import F32, cosine, normalize
from patchsight_serve.next_vectors import NextVectors

Until = Callable[[Callable[[], object]], None]
ENCODER, OTHER = Identity("vit", "a" * 64), Identity("vit", "b" * 64)
LIMIT, COUNT = 500, 900
FILE = "gallery.index"


def clustered(count: int, seed: int = 0, dim: int = 16) -> F32:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((30, dim))
    return normalize((centers[rng.integers(0, 30, count)] + 0.4 * rng.standard_normal((count, dim))).astype(np.float32))


def add(gallery: Gallery, vectors: dict[str, F32], data: bytes = b"", **how: Any) -> None:
    images = [NewImage(Item(id), id.encode() + data, b"thumb", v) for id, v in vectors.items()]
    gallery.add(images, ENCODER, **how)


def check(gallery: Gallery, truth: dict[str, F32]) -> None:
    """All that is there is found, each by itself; where all lists are visited, in the order of brute force."""
    queries = clustered(10, seed=5)
    ids = sorted(truth)
    matrix = np.stack([truth[id] for id in ids])
    assert len(gallery) == len(ids)
    assert {n.id for n in gallery.neighbors(queries[0], 1000)} == set(ids)
    for query in queries:
        scores = cosine(matrix, query)
        order = np.lexsort((ids, -scores))[:LIMIT]
        found = gallery.neighbors(query, 1000)
        assert [(n.id, n.score) for n in found[:LIMIT]] == [(ids[i], scores[i]) for i in order]
    for id in random.Random(0).sample(ids, 50):
        assert gallery.neighbors(truth[id], 1)[0].score == pytest.approx(1, abs=1e-6)
        assert id in {n.id for n in gallery.neighbors(truth[id], 10, min_score=1 - 1e-6)}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Gallery]]:
    """`opened(folder)`; with `build=False` a build of the index would fail, and be noticed."""
    galleries: list[Gallery] = []
    build = index_module.build

    def open_it(folder: Path, build_it: bool = True, limit: int = LIMIT) -> Gallery:
        monkeypatch.setattr(index_module, "build", build if build_it else None)
        galleries.append(Gallery(folder, exact_limit=limit))
        return galleries[-1]

    yield open_it
    for gallery in galleries:
        gallery._index.close()


@pytest.fixture
def filled(opened: Callable[..., Gallery], tmp_path: Path, until: Until) -> tuple[Gallery, dict[str, F32]]:
    """One with an approximate index, and what is in it."""
    gallery, truth = opened(tmp_path / "g"), {f"i{i:03d}": v for i, v in enumerate(clustered(COUNT))}
    add(gallery, truth)
    until(lambda: not gallery.index.building)
    assert gallery.index.kind == "ivf"
    return gallery, truth


def killed(gallery: Gallery, to: Path) -> Path:
    """What a kill at this moment leaves on the disk."""
    shutil.copytree(gallery.record.path.parent, to, ignore=shutil.ignore_patterns("*.lock*", "*-shm"))
    return to


def lists(gallery: Gallery) -> list[set[int]]:
    held = gallery._index._approximate.codes.invlists
    return [
        set(index_module.faiss.rev_swig_ptr(held.get_ids(i), held.list_size(i)).tolist()) for i in range(held.nlist)
    ]


def test_a_start_takes_it_as_it_was(
    filled: tuple[Gallery, dict[str, F32]], opened: Callable[..., Gallery], caplog: pytest.LogCaptureFixture
) -> None:
    gallery, truth = filled
    check(gallery, truth)
    state, held = gallery.index, lists(gallery)
    written = (gallery.record.path.parent / FILE).read_bytes()
    gallery.close()
    caplog.set_level(logging.INFO)
    again = opened(gallery.record.path.parent, build_it=False)
    assert again.index == state
    assert lists(again) == held
    assert "900 vectors; 0 have come since" in caplog.text
    check(again, truth)
    again.close()
    assert (again.record.path.parent / FILE).read_bytes() == written


def changed(gallery: Gallery, truth: dict[str, F32]) -> dict[str, F32]:
    """Add, remove, replace; a replaced and a removed image in one, and one that came and went."""
    fresh = {f"n{i:02d}": v for i, v in enumerate(clustered(40, seed=1))}
    add(gallery, fresh)
    other = dict(zip(("i010", "i011", "n00"), clustered(3, seed=2), strict=True))
    add(gallery, other, b"other", replace=True)
    gone = ["i005", "i011", "n01"]
    for id in gone:
        gallery.delete(id)
    gallery.patch("i020", {"label": "new"})
    return {id: v for id, v in (truth | fresh | other).items() if id not in gone}


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_what_was_written_since_is_caught_up(
    filled: tuple[Gallery, dict[str, F32]], opened: Callable[..., Gallery], tmp_path: Path, end: str
) -> None:
    gallery, truth = filled
    truth = changed(gallery, truth)
    check(gallery, truth)
    folder = killed(gallery, tmp_path / "killed")
    if end == "closed":
        gallery.close()
        folder = gallery.record.path.parent
    again = opened(folder, build_it=False)
    assert (again.index.kind, again.index.building) == ("ivf", False)
    check(again, truth)
    assert again.encoder == ENCODER
    add(again, {"later": clustered(1, seed=3)[0]})
    check(again, truth | {"later": clustered(1, seed=3)[0]})
    again.close()
    last = opened(folder, build_it=False)
    check(last, truth | {"later": clustered(1, seed=3)[0]})


def test_a_flipped_byte_or_a_cut_is_found_and_the_index_built_again(
    filled: tuple[Gallery, dict[str, F32]], opened: Callable[..., Gallery], until: Until, caplog
) -> None:
    gallery, truth = filled
    gallery.close()
    path, rng = gallery.record.path.parent / FILE, random.Random(0)
    written = path.read_bytes()
    places = [0, 7, 8, 23, 24, 28, 40, len(written) - 1, *(rng.randrange(len(written)) for _ in range(16))]
    damaged = [written[:at] + bytes([written[at] ^ 1 << rng.randrange(8)]) + written[at + 1 :] for at in places]
    damaged += [written[: rng.randrange(len(written))] for _ in range(4)] + [b"", written[:26], written + b"x"]
    for content in damaged:
        path.write_bytes(content)
        caplog.clear()
        assert index_file.IndexFile(path).read(gallery._index._vectors) is None
        assert not path.exists()
        assert "gallery.index is of no use, and removed: it is" in caplog.text
    path.write_bytes(damaged[0])
    again = opened(path.parent)
    check(again, truth)
    until(lambda: not again.index.building)
    assert again.index.kind == "ivf"
    check(again, truth)
    again.close()
    assert len(path.read_bytes()) == len(written)
    check(opened(path.parent, build_it=False), truth)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("vectors", "its vectors are not those of the record"),
        ("size", "its vectors have 16 values, those of the record 8"),
        ("more", "513 of 963 vectors of the record are not in it"),
        ("fewer", ""),
        ("version", "it is of another version"),
    ],
)
def test_one_that_is_not_of_this_record(
    filled: tuple[Gallery, dict[str, F32]], opened: Callable[..., Gallery], until: Until, tmp_path: Path, caplog,
    what: str, said: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gallery, truth = filled
    gallery.close()
    folder = tmp_path / "other"
    other = opened(folder, limit=10**6)
    if what == "vectors":
        truth = truth | {"i777": clustered(1, seed=8)[0]}
    elif what == "size":
        truth = dict(zip(truth, clustered(COUNT, dim=8), strict=True))
    elif what == "fewer":
        truth = dict(list(truth.items())[:450])
    elif what == "version":
        monkeypatch.setattr(index_file, "asdict", lambda plan: {"lists": 7, "probes": [1], "more": plan.size})
        index_file.IndexFile(gallery.record.path.parent / FILE).write(
            gallery._index._approximate, gallery._index._vectors, nullcontext
        )
    add(other, truth)
    if what == "more":
        for id in list(truth)[450:]:
            other.delete(id)
        more = {f"n{i}": v for i, v in enumerate(clustered(513, seed=9))}
        add(other, more)
        truth = dict(list(truth.items())[:450]) | more
    other.close()
    shutil.copy(gallery.record.path.parent / FILE, folder / FILE)
    again = opened(folder)
    assert said in caplog.text
    until(lambda: not again.index.building)
    assert again.index.kind == ("flat" if what == "fewer" else "ivf")
    if what != "size":
        check(again, truth)


def test_a_damaged_row_leaves_it(filled: tuple[Gallery, dict[str, F32]], opened: Callable[..., Gallery]) -> None:
    gallery, truth = filled
    gallery.close()
    content = bytearray(gallery.record.path.read_bytes())
    content[content.index(truth["i007"].tobytes()) + 5] ^= 0x10
    gallery.record.path.write_bytes(content)
    again = opened(gallery.record.path.parent, build_it=False)
    assert again.damaged == ["i007"]
    assert again.index.kind == "ivf"
    check(again, {id: v for id, v in truth.items() if id != "i007"})


def test_another_encoder_takes_over(
    filled: tuple[Gallery, dict[str, F32]], opened: Callable[..., Gallery], tmp_path: Path, until: Until, caplog
) -> None:
    """The file of before is not taken for the new one's, which is written in its turn."""
    gallery, truth = filled
    before = (gallery.record.path.parent / FILE).read_bytes()
    vectors = dict(zip(truth, clustered(COUNT, seed=7), strict=True))
    following = NextVectors(gallery, OTHER)
    keys = {id: key for key, (id, _) in gallery.names(gallery.keys()).items()}
    following.put({keys[id]: v for id, v in vectors.items()})
    heir = following.take_over()
    assert heir is not None
    until(lambda: not heir.index.building)
    check(heir, vectors)
    folder = killed(heir, tmp_path / "killed")
    heir.close()
    again = opened(folder, build_it=False)
    assert again.index.kind == "ivf"
    check(again, vectors)
    (heir.record.path.parent / FILE).write_bytes(before)
    again = opened(heir.record.path.parent)
    assert "its vectors are not those of the record" in caplog.text
    check(again, vectors)


@pytest.mark.parametrize("full", ["while it is written", "almost"])
def test_a_disk_without_space_for_it_is_said(
    opened: Callable[..., Gallery], tmp_path: Path, until: Until, caplog, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    (tmp_path / "g").mkdir()
    if full == "almost":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 30_000))
    else:
        (tmp_path / "g" / "gallery.index.partial").symlink_to("/dev/full")
    gallery, truth = opened(tmp_path / "g"), {f"i{i:03d}": v for i, v in enumerate(clustered(COUNT))}
    add(gallery, truth)
    until(lambda: not gallery.index.building)
    assert gallery.index.kind == "ivf"
    check(gallery, truth)
    said = "only 30,000 are free" if full == "almost" else "No space left on device"
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "gallery.index was not written, the next start builds the index anew: " in record.message
    assert said in record.message
    assert list((tmp_path / "g").glob("gallery.index*")) == []
