"""The benchmark of the gallery: what it computes, against numpy, and two contenders that cannot be wrong."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gallery_arm
import gallery_load
import gallery_report
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from gallery_load import Load, ask, ask_on, percentiles, recall
from gallery_peers.contender import DIM, F32, I64, SHARES, TIERS, InProcess, K, Search, tier_of, tiers
from gallery_vectors import QUERIES, prepare

COUNT = 6000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    rows = np.random.default_rng(1).standard_normal((QUERIES + 50, DIM)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), DIM)
    pq.write_table(pa.table({"embedding": column}), runs / "real.parquet")
    return prepare(runs, COUNT)


def test_the_truth_is_brute_forces(data: Path) -> None:
    vectors, queries = np.load(data / "vectors.npy"), np.load(data / "queries.npy")
    truth = np.load(data / "truth.npz")
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    for name, every in {"all": 1, **SHARES}.items():
        rows = np.arange(0, COUNT, every)
        best = -np.sort(-scores[:, rows], axis=1)[:, :K]
        found = truth[name][:, : best.shape[1]]
        assert (found % every == 0).all()
        np.testing.assert_allclose(np.take_along_axis(scores, found, axis=1), best, atol=1e-6)
        assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all()
        assert (truth[name][:, best.shape[1] :] == -1).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_made_up_queries_have_their_planted_neighbors_and_real_ones_are_other_images(data: Path) -> None:
    scores = np.load(data / "queries.npy") @ np.load(data / "vectors.npy").T
    assert (np.sort(scores[:QUERIES], axis=1)[:, -K:] > 0.95).mean() > 0.9
    assert scores[QUERIES:].max() < 0.9  # random rows in this test: none is a copy


def test_a_filter_by_tier_lets_through_what_its_share_says() -> None:
    rows = np.arange(30_000)
    for share, every in SHARES.items():
        assert (rows[tiers(rows) <= tier_of(share)] == np.arange(0, len(rows), every)).all()
    assert set(tiers(rows).tolist()) == set(range(TIERS + 1))


@pytest.mark.parametrize("seed", range(5))
def test_recall_is_the_share_of_true_keys_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, found = (np.array([rng.choice(20, K, replace=False) for _ in range(7)]) for _ in range(2))
    truth[2, 4:], found[3, 5:] = -1, -1
    hits = total = 0
    for true, mine in zip(truth.tolist(), found.tolist(), strict=True):
        hits += len({key for key in true if key >= 0} & {key for key in mine if key >= 0})
        total += sum(key >= 0 for key in true)
    assert recall(found, truth) == pytest.approx(hits / total)


def test_percentiles_are_numpys() -> None:
    assert percentiles([float(n) for n in range(101)]) == {"p50_ms": 50.0, "p99_ms": 99.0}
    assert percentiles([0.123456]) == {"p50_ms": 0.123, "p99_ms": 0.123}


def test_asking_ends_with_the_time_and_notes_what_is_missing() -> None:
    def slow(_: F32) -> list[int]:
        time.sleep(0.02)
        return [7, 8]

    keys, ms = ask(slow, np.zeros((1000, DIM), np.float32), 0.1)
    assert 1 <= len(ms) < 1000
    assert min(ms) >= 20
    assert keys.tolist() == [[7, 8] + [-1] * (K - 2)] * len(ms)


class Noted(InProcess):
    """Remembers who asked, and what was added."""

    kept, efforts = "nothing", (1,)

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.added: list[tuple[I64, F32, I64]] = []
        self.broken = False

    def version(self) -> str:
        return "0"

    def add(self, keys: I64, vectors: F32, tiers: I64) -> None:
        self.added.append((keys, vectors, tiers))

    def finish(self) -> None: ...

    def close(self) -> None: ...

    @contextmanager
    def client(self, effort: int, tier: int | None, by: str) -> Iterator[Search]:  # noqa: ARG002
        if self.broken:
            raise OSError("no")
        self.threads.add(threading.get_ident())
        yield lambda _: [0]


def test_clients_are_threads_and_the_writers_vectors_are_new_and_far_from_all_filters() -> None:
    contender = Noted()
    figures = ask_on(contender, Load(1), np.zeros((9, DIM), np.float32), clients=4, seconds=0.4, writes=True)
    assert len(contender.threads) == 4
    keys = np.concatenate([keys for keys, _, _ in contender.added])
    assert len(np.unique(keys)) == len(keys) >= gallery_load.WRITTEN
    assert keys.min() >= gallery_load.NEW_KEYS
    for _, vectors, found in contender.added:
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert set(found.tolist()) == {TIERS}
    assert figures["per_s"] > 0
    assert "written_per_s" not in ask_on(contender, Load(1), np.zeros((9, DIM), np.float32), 1, 0.05)


def test_a_client_that_breaks_ends_the_measurement_with_its_error() -> None:
    contender = Noted()
    contender.broken = True
    with pytest.raises(OSError, match="no"):
        ask_on(contender, Load(1), np.zeros((9, DIM), np.float32), clients=3, seconds=0.1, writes=True)


@pytest.mark.parametrize("name", ["faiss_flat", "patchsight"])
def test_exact_contenders_find_all_in_every_share(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(name: str, verb: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["gallery_arm.py", name, verb, str(tmp_path / "store"), str(data), "0.05"])
        gallery_arm.main()
        return dict(json.loads(capsys.readouterr().out))

    filled, asked = says(name, "fill"), says("patchsight_exact" if name == "patchsight" else name, "ask")
    assert filled["bytes"] >= COUNT * DIM * 4
    (step,) = asked["ladder"]
    for found in (
        *(step[half] for half in gallery_arm.HALVES),
        *(f for by in asked["filters"].values() for f in by.values()),
    ):
        assert found["recall"] == 1.0
        assert found["queries"] >= 1


def test_the_effort_is_the_least_that_finds_enough_else_the_one_that_finds_most() -> None:
    def steps(*recalls: float) -> list[dict[str, Any]]:
        return [{"effort": effort, "real": {"recall": found}} for effort, found in enumerate(recalls)]

    assert gallery_arm.enough(steps(0.5, 0.991, 0.99, 1.0), "real") == 1
    assert gallery_arm.enough(steps(0.5, 0.97, 0.9), "real") == 1


def of_arm(label: str, p50: float, filled: bool = True, writes: bool = True) -> dict[str, Any]:
    """Figures of one arm, in which everything takes `p50`."""
    times = {"p50_ms": p50, "p99_ms": 2 * p50, "per_s": 10.0, "cpu_ms": p50}
    half = times | {"recall": 0.995}
    fill = {
        "kept": "all",
        "add_s": 2.0,
        "finish_s": 8.0,
        "add_cpu_s": 1.0,
        "finish_cpu_s": 2.0,
        "bytes": 1000 * 1536 * 2,
    }
    asked = {
        "cold_s": 1.0, "ready_s": 3.0, "memory_mb": 1536 * 1000 * 1.5 / 2**20, "efforts": {"made up": 4, "real": 4},
        "ladder": [{"effort": 4, "made up": half, "real": half}], "alone": {"made up": times, "real": times},
        "filters": {"filter": dict.fromkeys(SHARES, half)}, "writes": writes, "clients_1": times, "clients_16": times,
    }  # fmt: skip
    return {"label": label, "fill": fill if filled else None, "ask": asked}


def test_the_tables_say_ratios_and_who_is_missing(tmp_path: Path) -> None:
    arms = {
        "patchsight": of_arm("patchsight", 2.0),
        "patchsight_exact": of_arm("patchsight, exact", 50.0, filled=False),
        "faiss_lists": of_arm("FAISS, lists", 4.0, writes=False),
        "faiss_codes": of_arm("FAISS, lists of codes", 1.6, writes=False),
        "usearch": of_arm("usearch", 3.0),
        "pgvector": {"label": "pgvector", "fill": None, "ask": {"failure": "fill: no room"}},
    }
    figures = {"count": 1000, "dim": DIM, "arms": arms}
    said = gallery_report.tables(figures)
    lines = said.splitlines()
    assert lines[0] == "1,000 vectors of 384 numbers."
    assert "| patchsight | 500 | 100 | 3 | all | 2.00 | 1.0 | 3.0 | 1.50 |" in lines
    assert (
        "| patchsight | 0.995 / 0.995 | 2.00 / 4.00 | 2.00 / 4.00 | 2.00 | 1.25 | 2.00 / 4.00 | 2.00 / 4.00 | 10 |"
        in lines
    )
    assert (
        "| usearch | 0.995 / 0.995 | 3.00 / 6.00 | 3.00 / 6.00 | 3.00 | 1.88 | 3.00 / 6.00 | 3.00 / 6.00 | 10 |"
        in lines
    )
    assert "patchsight's approximate search beside its exact one, by p50: 25.0× (real) and 25.0× (made up)." in lines
    assert lines[-1] == "pgvector is not in the tables: fill: no room"
    for table in said.split("\n\n"):
        rows = [line.count("|") for line in table.splitlines() if line.startswith("|")]
        assert len(set(rows)) <= 1
    gallery_report.draw(figures, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
