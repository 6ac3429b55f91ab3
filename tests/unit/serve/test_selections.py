"""What filters let through, remembered, against what a dictionary says at each moment."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from patchsight_serve import selections as selections_module
from patchsight_serve.embedded_gallery import EmbeddedGallery
from patchsight_serve.filters import Filter
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import I64, normalize
from patchsight_serve.selections import Selections

ENCODER = Identity("vit", "a" * 64)


class Rows:
    """A number under each key; "whether it is at least so large" is the condition."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}
        self.reads: list[int | None] = []  # of all, or of so many

    def read(self, _: str, values: Sequence[str], among: I64 | None) -> I64:
        self.reads.append(None if among is None else len(among))
        asked = sorted(self.numbers) if among is None else [k for k in among.tolist() if k in self.numbers]
        return np.array([k for k in asked if self.numbers[k] >= int(values[0])], np.int64)

    def best(self, least: int) -> list[int]:
        return sorted(k for k, number in self.numbers.items() if number >= least)


@pytest.mark.parametrize("changes", [3, 10**6])
def test_a_random_history_equals_a_dictionary(monkeypatch: pytest.MonkeyPatch, changes: int) -> None:
    """Also where so much was written that all is forgotten, and of more filters than are remembered."""
    monkeypatch.setattr(selections_module, "CHANGES", changes)
    monkeypatch.setattr(selections_module, "REMEMBERED", 4)
    rng, rows, key = np.random.default_rng(0), Rows(), 0
    selections = Selections(rows.read)
    for _ in range(400):
        written = rng.integers(0, key + 4, int(rng.integers(0, 3))).tolist()
        for one in written:
            if rng.random() < 0.3:
                rows.numbers.pop(one, None)
            else:
                rows.numbers[one] = int(rng.integers(0, 10))
        key = max([key, *written])
        selections.changed(written)
        for least in rng.integers(0, 6, 2).tolist():
            assert selections.keys("", [str(least)]).tolist() == rows.best(least)


def test_all_is_read_once_and_then_what_was_written() -> None:
    rows = Rows()
    rows.numbers = {key: key % 7 for key in range(1, 1000)}
    selections = Selections(rows.read)
    for _ in range(3):
        assert selections.keys("", ["3"]).tolist() == rows.best(3)
    rows.numbers[5000] = 6
    del rows.numbers[6]
    selections.changed([5000])
    selections.changed([6])
    for _ in range(3):
        assert selections.keys("", ["3"]).tolist() == rows.best(3)
    assert rows.reads == [None, 2]


def test_what_is_written_while_all_is_read_is_not_missed() -> None:
    rows, there, go_on = Rows(), threading.Event(), threading.Event()
    rows.numbers = {1: 5, 2: 5, 3: 0}

    def slow(where: str, values: Sequence[str], among: I64 | None) -> I64:
        found = rows.read(where, values, among)
        if among is None:
            there.set()
            assert go_on.wait(60)
        return found

    selections, found = Selections(slow), []
    asking = threading.Thread(target=lambda: found.append(selections.keys("", ["3"]).tolist()))
    asking.start()
    assert there.wait(60)
    rows.numbers = {2: 0, 3: 5, 4: 5}
    selections.changed([1, 2, 3, 4])
    go_on.set()
    asking.join(60)
    assert found == [[1, 2]]  # as it was when it was read
    assert selections.keys("", ["3"]).tolist() == [3, 4]


def test_a_read_that_fails_leaves_nothing_wrong() -> None:
    rows = Rows()
    rows.numbers = {1: 5}
    fails = [True]

    def read(where: str, values: Sequence[str], among: I64 | None) -> I64:
        if fails.pop():
            raise OSError("gone")
        fails.append(False)
        return rows.read(where, values, among)

    selections = Selections(read)
    with pytest.raises(OSError, match="gone"):
        selections.keys("", ["3"])
    fails.append(False)
    assert selections.keys("", ["3"]).tolist() == [1]


def test_every_way_to_write_is_noticed(tmp_path: Path) -> None:
    """Adding, replacing, describing, removing, and what came to nothing."""
    gallery, numbers = EmbeddedGallery(tmp_path / "g"), np.random.default_rng(0)
    wanted = Filter.of({"n": {"gte": 5}})

    def add(**numbers_by_id: int) -> None:
        images = [
            NewImage(Item(id, None, {"n": n}), f"{id}{n}".encode(), b"t", normalize(numbers.standard_normal(8)))
            for id, n in numbers_by_id.items()
        ]
        gallery.add(images, ENCODER, replace=True)

    def found() -> set[str]:
        return {n.id for n in gallery.neighbors(np.ones(8), 100, filter=wanted)}

    assert found() == set()
    add(a=5, b=4, c=6)
    assert found() == {"a", "c"}
    add(b=7, d=1)
    assert found() == {"a", "b", "c"}
    gallery.patch("a", {"metadata": {"n": 0}})
    gallery.patch("d", {"metadata": {"n": 9}})
    assert found() == {"b", "c", "d"}
    gallery.delete("c")
    assert found() == {"b", "d"}

    def half() -> None:
        with gallery.writing() as record, record.transaction():
            record.delete(record.find(["b"])["b"].key)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert found() == {"b", "d"}
    gallery.close()
    assert {n.id for n in EmbeddedGallery(tmp_path / "g").neighbors(np.ones(8), 100, filter=wanted)} == {"b", "d"}
