"""Galleries as a whole: removed or exchanged in one step, whatever is at them, and whenever the process is killed."""

import subprocess
import sys
import textwrap
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from patchsight_serve.bulk_add import add_vectors
from patchsight_serve.collection import DEFAULT, NoGalleries, Outline
from patchsight_serve.embedded_galleries import EmbeddedGalleries as Galleries
from patchsight_serve.embedded_gallery import EmbeddedGallery as Gallery
from patchsight_serve.errors import Conflict, NotFound, PatchsightError, Superseded
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import normalize

ENCODER, OTHER = Identity("vit", "a" * 64), Identity("vit", "b" * 64)


def new(id: str, seed: int, dim: int = 8) -> NewImage:
    vector = normalize(np.random.default_rng(seed).standard_normal(dim).astype(np.float32))
    return NewImage(Item(id), id.encode(), b"thumb", vector)


def fill(gallery: Gallery, prefix: str, count: int = 5, encoder: Identity = ENCODER) -> None:
    gallery.add([new(f"{prefix}{i}", i) for i in range(count)], encoder)


def ids(gallery: Gallery) -> list[str]:
    return [image.id for image in gallery.page()[0]]


@pytest.fixture
def galleries(tmp_path: Path):
    opened = Galleries(tmp_path / "galleries")
    yield opened
    opened.close()


def record(galleries: Galleries, prefix: str) -> Path:
    """A record in a folder of its own, as a restore has it."""
    folder = galleries.scratch.make()
    gallery = Gallery(folder)
    fill(gallery, prefix)
    gallery.close()
    return folder / "gallery.sqlite"


def test_a_removed_gallery_is_gone_with_its_files_and_its_name_is_free(galleries: Galleries, tmp_path: Path) -> None:
    fill(galleries.get("mine", create=True), "a")
    fill(galleries.get("other", create=True), "o")
    galleries.delete("mine")
    assert galleries.names() == ["other"]
    assert not any(path.is_file() and "other" not in path.parts for path in tmp_path.rglob("*"))
    for call in (galleries.get, galleries.delete):
        with pytest.raises(NotFound, match="no gallery 'mine'"):
            call("mine")
    fill(galleries.get("mine", create=True), "b", encoder=OTHER)
    assert ids(galleries.get("mine")) == [f"b{i}" for i in range(5)]
    assert ids(galleries.get("other")) == [f"o{i}" for i in range(5)]


def test_a_gallery_that_is_not_open_is_removed_too(galleries: Galleries) -> None:
    fill(galleries.get("mine", create=True), "a")
    galleries.close()
    galleries.delete("mine")
    assert galleries.names() == []


def test_whoever_holds_a_removed_gallery_gets_404_and_never_the_new_one_of_its_name(galleries: Galleries) -> None:
    old = galleries.get("mine", create=True)
    fill(old, "a")
    query = old.vectors(["a1"])[0]
    galleries.delete("mine")
    fill(galleries.get("mine", create=True), "b")
    calls = [
        lambda: old.neighbors(query), lambda: old.neighbors(query, label="x"), lambda: old.get("a1"), old.page,
        lambda: old.vectors(["a1"]), lambda: old.thumbnail("a1"), lambda: old.original("a1"),
        lambda: old.holds([("a1", "x")]), lambda: old.add([new("c", 9)], ENCODER), lambda: old.add([], ENCODER),
        lambda: old.delete("a1"), lambda: old.patch("a1", {"label": "x"}), lambda: old.fact("encoder"),
        lambda: old.long_read(threading.Event()).__enter__(), lambda: add_vectors(old, [], ENCODER),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(NotFound, match="no gallery 'mine': it was removed"):
            call()
    assert ids(galleries.get("mine")) == [f"b{i}" for i in range(5)]


def test_readers_and_a_writer_at_a_gallery_that_is_removed_and_made_anew(galleries: Galleries) -> None:
    """Each generation has ids of its own: an answer with any of another would be a wrong neighbor."""
    fill(galleries.get("mine", create=True), "0-", 30)
    stop, wrong, answers = threading.Event(), [], [0, 0]

    def read() -> None:
        query = np.random.default_rng(1).standard_normal(8).astype(np.float32)
        while not stop.is_set():
            try:
                found = galleries.get("mine").neighbors(query, 10)
            except NotFound:
                answers[1] += 1
                continue
            except PatchsightError as error:
                wrong.append(error)
                continue
            generations = {neighbor.id.partition("-")[0] for neighbor in found}
            if len(generations) > 1 or len(found) not in (0, 10):
                wrong.append(found)
            answers[0] += 1

    def write() -> None:
        while not stop.is_set():
            try:
                galleries.get("mine").patch("0-1", {"label": "x"})
            except NotFound:
                continue

    threads = [threading.Thread(target=work) for work in (read, read, write)]
    for thread in threads:
        thread.start()
    for generation in range(1, 15):
        galleries.delete("mine")
        fill(galleries.get("mine", create=True), f"{generation}-", 30)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert answers[0] > 0


def test_the_default_gallery_is_emptied_and_free_and_known_to_have_been_used(galleries: Galleries) -> None:
    galleries.get(DEFAULT).add([new("a", 0)], ENCODER, facts={"samples": "24"})
    old = galleries.get(DEFAULT)
    galleries.delete(DEFAULT)
    emptied = galleries.get(DEFAULT)
    assert (len(emptied), emptied.encoder, ids(emptied)) == (0, None, [])
    assert emptied.fact("samples") is None
    assert emptied.fact("encoder") is not None  # by which the sample photos know that they are not wanted
    with pytest.raises(NotFound):
        old.get("a")
    emptied.add([new("b", 1, dim=4)], OTHER)
    galleries.delete(DEFAULT)
    assert len(galleries.get(DEFAULT)) == 0


def test_a_published_record_is_the_gallery(galleries: Galleries) -> None:
    assert ids(galleries.publish("mine", record(galleries, "a"))) == [f"a{i}" for i in range(5)]
    old = galleries.get("mine")
    with pytest.raises(Conflict, match="there is a gallery 'mine'; replace=true replaces it"):
        galleries.publish("mine", record(galleries, "b"))
    assert ids(old) == [f"a{i}" for i in range(5)]
    galleries.publish("mine", record(galleries, "b"), replace=True)
    assert ids(galleries.get("mine")) == [f"b{i}" for i in range(5)]
    with pytest.raises(Superseded, match="was replaced meanwhile; ask again"):
        old.get("a1")
    for name in ("..", ".scratch", "a/b", ""):
        with pytest.raises(NotFound):
            galleries.publish(name, record(galleries, "c"))


def test_an_empty_default_gallery_is_not_in_the_way(galleries: Galleries) -> None:
    assert len(galleries.get(DEFAULT)) == 0
    galleries.check_free(DEFAULT)
    galleries.publish(DEFAULT, record(galleries, "a"))
    with pytest.raises(Conflict):
        galleries.check_free(DEFAULT)
    galleries.check_free(DEFAULT, replace=True)


def test_a_gallery_that_cannot_be_read_can_be_replaced(galleries: Galleries, tmp_path: Path) -> None:
    folder = tmp_path / "galleries" / "mine"
    folder.mkdir(parents=True)
    (folder / "gallery.sqlite").write_bytes(b"something else entirely" * 1000)
    (folder / "gallery.sqlite-wal").write_bytes(b"a log of it")
    with pytest.raises(PatchsightError):
        galleries.get("mine")
    assert ids(galleries.publish("mine", record(galleries, "a"), replace=True)) == [f"a{i}" for i in range(5)]


def test_a_gallery_of_another_process_is_neither_removed_nor_replaced(galleries: Galleries) -> None:
    fill(galleries.get("mine", create=True), "a")
    others = Galleries(galleries._folder)
    for call in (lambda: others.delete("mine"), lambda: others.publish("mine", record(others, "b"), replace=True)):
        with pytest.raises(Conflict, match="open in another process"):
            call()
    assert ids(galleries.get("mine")) == [f"a{i}" for i in range(5)]
    others.close()


KILLED = """
    import os, shutil, signal, sys
    from pathlib import Path
    from patchsight_serve import collection, scratch
    from patchsight_serve.embedded_galleries import EmbeddedGalleries as Galleries
    folder, what, where = sys.argv[1:]
    galleries = Galleries(Path(folder))
    file = galleries.scratch.make() / "gallery.sqlite"
    shutil.copyfile(Path(folder).parent / "new.sqlite", file)
    name = where.split()[-1]
    module = {"rename": Path, "replace": os, "rmtree": shutil}[name]
    real = getattr(module, name)
    def deadly(*args, **kwargs):
        if "after" in where:
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    if "unopened" not in where:
        galleries.get("mine")
    setattr(module, name, deadly)
    galleries.delete("mine") if what == "delete" else galleries.publish("mine", file, replace=True)
"""


@pytest.mark.parametrize(
    ("what", "where", "left"),
    [
        ("delete", "before rename", "a"),
        ("delete", "after rename", None),
        ("delete", "before rmtree", None),
        ("publish", "before replace", "a"),
        ("publish", "after replace", "n"),
    ],
)
def test_a_kill_leaves_all_or_nothing(tmp_path: Path, what: str, where: str, left: str | None) -> None:
    galleries = Galleries(tmp_path / "galleries")
    fill(galleries.get("mine", create=True), "a")
    record(galleries, "n").rename(tmp_path / "new.sqlite")
    galleries.close()
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "galleries"), what, where]
    assert subprocess.run(command, check=False).returncode == -9
    galleries = Galleries(tmp_path / "galleries")
    galleries.scratch.clear()
    if left is None:
        assert galleries.names() == []
    else:
        mine = galleries.get("mine")
        assert ids(mine) == [f"{left}{i}" for i in range(5)]
        assert [n.id for n in mine.neighbors(new("x", 3).vector, 1)] == [f"{left}3"]
        assert mine.damaged == []
    galleries.close()
    rest = {path.parent.name for path in tmp_path.rglob("*") if path.is_file() and path.name != "new.sqlite"}
    assert rest == ({"mine"} if left else set())


def test_what_a_kill_left_in_the_log_survives_a_replacement_that_is_killed(tmp_path: Path) -> None:
    """The last writes of a gallery that nobody has opened since are in a file beside, which must not go first."""
    galleries = Galleries(tmp_path / "galleries")
    fill(galleries.get("mine", create=True), "a")
    folder = tmp_path / "galleries" / "mine"
    left = {name: (folder / name).read_bytes() for name in ("gallery.sqlite", "gallery.sqlite-wal")}
    record(galleries, "n").rename(tmp_path / "new.sqlite")
    galleries.close()
    for name, content in left.items():
        (folder / name).write_bytes(content)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder.parent), "publish", "unopened before replace"]
    assert subprocess.run(command, check=False).returncode == -9
    galleries = Galleries(tmp_path / "galleries")
    assert ids(galleries.get("mine")) == [f"a{i}" for i in range(5)]
    galleries.close()


def test_there_is_nothing_to_remove_where_there_are_no_galleries() -> None:
    none = NoGalleries(3)
    for call in (none.delete, none.exists, none.check_free, lambda name: none.publish(name, Path("x"))):
        with pytest.raises(NotFound, match="--processes 1"):
            call("mine")


def test_outlines_are_told_without_opening_a_gallery(tmp_path: Path) -> None:
    folder = tmp_path / "galleries"
    with closing(Galleries(folder)) as before:
        fill(before.get("many", create=True), "m", 7)
        before.get("none", create=True)
        fill(before.get("broken", create=True), "b")
    (folder / "broken" / "gallery.sqlite").write_bytes(b"SQLite format 3\0 and no more")
    with closing(Galleries(folder)) as galleries:
        expected = [Outline("broken", None, None), Outline("many", 7, ENCODER), Outline("none", 0, None)]
        assert galleries.outlines() == expected
        assert galleries._open == {}
        galleries.get("many").delete("m0")
        assert galleries.outlines()[1] == Outline("many", 6, ENCODER)  # as it is in memory
    assert NoGalleries(4).outlines() == []
