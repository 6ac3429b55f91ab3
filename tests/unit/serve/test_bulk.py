"""Bulk embedding that is stopped: the same command goes on, computes nothing twice, and writes the very same file."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from patchsight_serve import bulk, embed, embedding_file
from patchsight_serve import journal as journals
from patchsight_serve.bulk import BulkFile, embedding
from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.embedder import LocalEmbedder
from patchsight_serve.embedding_file import read_embeddings
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.ort_encoder import OrtEncoder


def pictures(count: int, encode: Callable[..., bytes], bad_every: int = 100) -> list[bytes]:
    """Small ones, all different; each hundredth is none."""
    noise = np.random.default_rng(count).integers(0, 256, (count, 20, 16, 3), np.uint8)
    return [b"no picture" if i % bad_every == 7 else encode(noise[i]) for i in range(count)]


def parquet(path: Path, images: Iterable[bytes]) -> Path:
    column = pa.array([{"bytes": data, "path": f"{i:05}.png"} for i, data in enumerate(images)])
    pq.write_table(pa.table({"image": column, "label": [i % 3 for i in range(len(column))]}), path)
    return path


class Counting(LocalEmbedder):
    """Counts what it embeds."""

    embedded = 0

    def _decode(self, data: bytes) -> Any:
        self.embedded += 1
        return super()._decode(data)


@pytest.fixture
def dataset(tmp_path: Path, encode: Callable[..., bytes]) -> Dataset:
    return read_dataset(parquet(tmp_path / "source.parquet", pictures(300, encode)))


def make(
    out: Path, dataset: Dataset, embedder: LocalEmbedder, advance: Callable[[int], None] = lambda _: None
) -> tuple[int, list[dict[str, str]]]:
    count, skipped = BulkFile(out).make(
        dataset, embedder.encoder, embedder.output, embedding(dataset, embedder), advance
    )
    lines = skipped.path.read_text().splitlines() if skipped.count else []
    return count, [json.loads(line) for line in lines]


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 64, 299])
def test_a_stop_costs_no_more_than_what_was_in_work(after: int, dataset: Dataset, tmp_path: Path) -> None:
    whole, out, embedder = tmp_path / "whole.parquet", tmp_path / "e.parquet", Counting(FakeEncoder())
    expected = make(whole, dataset, embedder)
    assert embedder.embedded == 300

    def stop(_: int) -> None:
        done.append(_)
        if sum(done) >= after:
            raise Stop

    done: list[int] = []
    with pytest.raises(Stop):
        make(out, dataset, embedder, stop)
    assert not out.exists()
    kept, embedder.embedded, done = sum(done), 0, []
    assert make(out, dataset, embedder, done.append) == expected
    assert (done[0], sum(done)) == (kept, 300)
    assert embedder.embedded == 300 - kept
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "e.parquet", "e.parquet.skipped.jsonl", "source.parquet", "whole.parquet", "whole.parquet.skipped.jsonl",
    ]  # fmt: skip


def test_the_file_is_the_sources_rows_and_the_list_the_others(dataset: Dataset, tmp_path: Path) -> None:
    embedder = LocalEmbedder(FakeEncoder())
    count, skipped = make(tmp_path / "e.parquet", dataset, embedder)
    found = read_embeddings(tmp_path / "e.parquet")
    good = [i for i in range(300) if i % 100 != 7]
    assert (count, found.names) == (297, [f"{i:05}.png" for i in good])
    assert found.labels is not None
    assert found.labels.tolist() == [i % 3 for i in good]
    alone = [next(embedder.embed_each([dataset.read(i)])) for i in good]
    np.testing.assert_array_equal(found.vectors, np.stack(alone))  # type: ignore[arg-type]
    assert [line["name"] for line in skipped] == ["00007.png", "00107.png", "00207.png"]
    assert all("not an image" in line["reason"] for line in skipped)


def test_the_list_is_written_as_it_goes_and_begun_anew(dataset: Dataset, tmp_path: Path) -> None:
    out, seen = tmp_path / "e.parquet", []
    listed = tmp_path / "e.parquet.skipped.jsonl"
    listed.write_text('{"name": "of another work", "reason": "torn')

    def look(_: int) -> None:
        seen.append(listed.read_text().count("\n") if listed.exists() else 0)
        if len(seen) == 6:
            raise Stop

    with pytest.raises(Stop):
        make(out, dataset, LocalEmbedder(FakeEncoder()), look)
    assert seen == [0, 1, 1, 1, 2, 2]
    listed.write_text(listed.read_text() + '{"name": "00207.png", "rea')  # torn by a kill
    _, skipped = make(out, dataset, LocalEmbedder(FakeEncoder()))
    assert [line["name"] for line in skipped] == ["00007.png", "00107.png", "00207.png"]


def test_rows_of_two_works_are_not_mixed(dataset: Dataset, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    out = tmp_path / "e.parquet"

    def begin(dataset: Dataset, embedder: LocalEmbedder, advance: Callable[[int], None] = lambda _: None) -> None:
        make(out, dataset, embedder, advance)

    def stop(n: int) -> None:
        if n:
            raise Stop

    with pytest.raises(Stop):
        begin(dataset, LocalEmbedder(FakeEncoder()), stop)
    fewer = read_dataset(parquet(tmp_path / "fewer.parquet", pictures(200, encode)))
    other = read_dataset(parquet(tmp_path / "other.parquet", [*pictures(299, encode), b"larger" * 50]))
    for source, embedder, message in (
        (dataset, LocalEmbedder(FakeEncoder("fake2")), r"32 images of a work .* begun with encoder 'fake' .* 'fake2'"),
        (dataset, LocalEmbedder(FakeEncoder(), "mean"), "begun with output 'cls', this is output 'mean'"),
        (fewer, LocalEmbedder(FakeEncoder()), "begun with number of images 300, this is number of images 200"),
        (other, LocalEmbedder(FakeEncoder()), "begun with list of images"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            begin(source, embedder)
    BulkFile(out).restart()
    begin(fewer, LocalEmbedder(FakeEncoder()))
    assert len(read_embeddings(out)) == 198
    with pytest.raises(InvalidRequest, match="exists already"):
        BulkFile(out)


def test_a_stop_behind_the_rename_is_a_finished_work(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, embedder = tmp_path / "e.parquet", Counting(FakeEncoder())

    def killed(_: Path) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(bulk.journals, "remove", killed)
        with pytest.raises(Stop):
            make(out, dataset, embedder)
    before, embedder.embedded = out.read_bytes(), 0
    assert make(out, dataset, embedder)[0] == 297
    assert (out.read_bytes(), embedder.embedded) == (before, 0)
    assert not list(tmp_path.glob("*.journal*"))


def test_a_file_that_came_meanwhile_is_not_overwritten(dataset: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "e.parquet"

    def stop(n: int) -> None:
        if n:
            out.write_text("mine")
            raise Stop

    with pytest.raises(Stop):
        make(out, dataset, LocalEmbedder(FakeEncoder()), stop)
    with pytest.raises(InvalidRequest, match="exists already"):
        make(out, dataset, LocalEmbedder(FakeEncoder()))
    assert out.read_text() == "mine"


@pytest.mark.parametrize("where", ["journal", "file"])
def test_a_full_disk_is_said_and_the_work_goes_on_when_there_is_space(
    where: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.parquet", tmp_path / "e.parquet"
    make(whole, dataset, LocalEmbedder(FakeEncoder()))

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "journal":
            patch.setattr(journals, "_SCHEMA", journals._SCHEMA + "PRAGMA max_page_count = 8")
        else:
            patch.setattr(embedding_file.EmbeddingWriter, "flush", full)
        with pytest.raises((PatchsightError, OSError), match=r"[Nn]o space left"):
            make(out, dataset, LocalEmbedder(FakeEncoder()))
    assert {path.name for path in tmp_path.glob("e.parquet*")} == {"e.parquet.journal", "e.parquet.skipped.jsonl"}
    embedder = Counting(FakeEncoder())
    make(out, dataset, embedder)
    assert embedder.embedded < (300 if where == "journal" else 1)
    assert out.read_bytes() == whole.read_bytes()


def test_a_name_that_is_no_unicode_is_kept_readable(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    for name, data in ((b"caf\xe9.png", pictures(1, encode)[0]), (b"\xff.png", b"no picture")):
        Path(tmp_path / os.fsdecode(name)).write_bytes(data)
    _, skipped = make(tmp_path / "e.parquet", read_dataset(tmp_path), LocalEmbedder(FakeEncoder()))
    assert read_embeddings(tmp_path / "e.parquet").names == [r"caf\xe9.png"]
    assert [line["name"] for line in skipped] == [r"\xff.png"]


# ---- processes that are killed


@pytest.fixture
def many(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    """4,000 pictures: a second or two of work."""
    return parquet(tmp_path / "many.parquet", pictures(400, encode) * 10)


def started(source: Path, out: Path, bundle: Path) -> subprocess.Popen[bytes]:
    line = [str(source), "--out", str(out), "--model-repository", str(bundle.parent)]
    return subprocess.Popen(
        [sys.executable, "-m", "patchsight_serve.embed", *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs do not hear it
    )


def kill_at_random(process: subprocess.Popen[bytes], journal: Path, rng: random.Random) -> None:
    """At most a second after it began to work."""
    begun = journal.stat().st_mtime_ns if journal.exists() else 0
    while process.poll() is None and not (journal.exists() and journal.stat().st_mtime_ns > begun):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.8))
    process.kill()
    process.communicate()


@pytest.fixture
def expected(many: Path, tmp_path: Path, tiny_bundle: Path) -> bytes:
    """What a run without a stop writes."""
    out = tmp_path / "whole.parquet"
    embed.main([str(many), "--out", str(out), "--model-repository", str(tiny_bundle.parent)])
    found, rows = read_embeddings(out), LocalEmbedder(OrtEncoder(tiny_bundle, 1))
    assert len(found) == 3960
    first = next(rows.embed_each([read_dataset(many).read(0)]))
    np.testing.assert_allclose(found.vectors[0], first, rtol=1e-5)  # type: ignore[arg-type]
    return out.read_bytes()


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.acceptance)])
def test_killed_at_any_moment_it_goes_on(
    kills: int, many: Path, expected: bytes, tmp_path: Path, tiny_bundle: Path
) -> None:
    out, rng = tmp_path / "e.parquet", random.Random(kills)
    for _ in range(kills):
        kill_at_random(started(many, out, tiny_bundle), tmp_path / "e.parquet.journal", rng)
        if out.exists() and not Path(f"{out}.journal").exists():  # it was quicker
            assert out.read_bytes() == expected
            out.unlink()
    process = started(many, out, tiny_bundle)
    printed, error = process.communicate()
    assert process.returncode == 0, error
    assert out.read_bytes() == expected
    assert len(Path(f"{out}.skipped.jsonl").read_text().splitlines()) == 40
    assert not list(tmp_path.glob("*.journal*"))


def test_ctrl_c_says_that_it_goes_on(many: Path, tmp_path: Path, tiny_bundle: Path) -> None:
    out = tmp_path / "e.parquet"
    process = started(many, out, tiny_bundle)
    while not Path(f"{out}.skipped.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert b"stopped; the same command goes on from here" in error
    assert b"Traceback" not in error
    assert Path(f"{out}.journal").exists()
    assert not out.exists()
