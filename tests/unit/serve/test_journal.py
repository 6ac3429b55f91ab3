"""The journal of bulk work: what was put is there, whatever ended the process; nothing is there in part."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from patchsight_serve import journal as journals
from patchsight_serve.errors import Conflict, InvalidRequest, StorageFull
from patchsight_serve.journal import Done, Journal

PLAN = {"encoder": "'tiny'", "output": "'cls'"}


def done(*rows: int) -> list[Done]:
    return [Done(row, "bad" if row % 5 == 4 else np.full(3, row + 0.25, np.float32)) for row in rows]


def same(found: list[Done], expected: list[Done]) -> bool:
    return len(found) == len(expected) and all(
        a.row == b.row and np.array_equal(a.result, b.result) for a, b in zip(found, expected, strict=True)
    )


def test_what_was_put_comes_back_in_order_after_a_reopening(tmp_path: Path) -> None:
    path = tmp_path / "new" / "e.journal"
    with closing(Journal(path, PLAN)) as journal:
        journal.put(done(7, 4, 5))
        journal.put(done(0, 9))
    with closing(Journal(path, PLAN)) as journal:
        assert same(list(journal.rows()), done(0, 4, 5, 7, 9))
        assert same(list(journal.bad()), done(4, 9))
        assert np.flatnonzero(journal.has(12)).tolist() == [0, 4, 5, 7, 9]
    journals.remove(path)
    assert list(path.parent.iterdir()) == []


def test_a_row_is_done_once_and_a_batch_as_a_whole(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / "j", PLAN)) as journal:
        journal.put(done(1, 2))
        with pytest.raises(Exception, match="UNIQUE"):
            journal.put(done(3, 2))
        assert same(list(journal.rows()), done(1, 2))


def test_one_process_at_a_time_and_one_plan(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with closing(Journal(path, PLAN)) as journal:
        journal.put(done(1, 2))
        with pytest.raises(Conflict, match="another process is at this work"):
            Journal(path, PLAN)
    with pytest.raises(
        InvalidRequest, match="2 images of a work that was begun with output 'cls', this is output 'mean'"
    ):
        Journal(path, PLAN | {"output": "'mean'"})
    with closing(Journal(path, PLAN)) as journal:
        assert same(list(journal.rows()), done(1, 2))


def test_what_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text("my notes" * 100)
    with pytest.raises(InvalidRequest, match="--restart removes it"):
        Journal(path, PLAN)
    assert path.read_text() == "my notes" * 100


def test_a_full_disk_costs_what_was_not_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, put = tmp_path / "j", 0
    monkeypatch.setattr(journals, "_SCHEMA", journals._SCHEMA + "PRAGMA max_page_count = 20")
    said = ""
    with closing(Journal(path, PLAN)) as journal:
        while not said:
            try:
                journal.put([Done(row, np.zeros(500, np.float32)) for row in range(put, put + 4)])
                put += 4
            except StorageFull as error:
                said = error.message
    assert "what is done is safe" in said
    assert put > 8
    monkeypatch.undo()
    with closing(Journal(path, PLAN)) as journal:
        assert np.flatnonzero(journal.has(1000)).tolist() == list(range(put))
        journal.put(done(*range(put, put + 9)))


def test_what_another_process_works_with_is_not_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with closing(Journal(path, PLAN)) as journal:
        journal.put(done(1, 2))
        with pytest.raises(Conflict, match="another process is at this work"):
            journals.discard(path)
    with closing(Journal(path, PLAN)) as journal:
        assert same(list(journal.rows()), done(1, 2))
    for _ in range(2):  # the second time there is none
        journals.discard(path)
        assert list(tmp_path.iterdir()) == []
    path.write_text("no journal" * 100)
    journals.discard(path)
    assert not path.exists()


def test_a_stray_log_without_its_file_is_nobodys(tmp_path: Path) -> None:
    """`remove` that was killed behind the file itself."""
    path = tmp_path / "j"
    journal = Journal(path, PLAN)
    journal.put(done(1, 2))
    log = (tmp_path / "j-wal").read_bytes()
    assert log
    journal.close()
    journals.remove(path)
    (tmp_path / "j-wal").write_bytes(log)
    with closing(Journal(path, PLAN | {"output": "other"})) as journal:
        assert list(journal.rows()) == []
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
