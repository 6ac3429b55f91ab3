import json
from pathlib import Path

import numpy as np
import pytest

from patchsight_train.history import Curve, read_history


def curve(values: np.ndarray) -> Curve:
    return Curve(np.arange(1.0, len(values) + 1), values)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(7).normal(size=23_457)


@pytest.mark.parametrize("most", [4, 10, 100, 1000])
def test_thinned_curves_keep_the_extremes_of_every_piece(noise: np.ndarray, most: int) -> None:
    full = curve(noise)
    thin = full.thin(most)
    assert most // 2 < len(thin.steps) <= most
    assert (np.diff(thin.steps) > 0).all()
    np.testing.assert_array_equal(thin.values, noise[thin.steps.astype(int) - 1])
    assert (thin.steps[0], thin.steps[-1]) == (1, len(noise))
    # Brute force: nobody is above, or below, all kept ones that are no further away than a piece is long.
    reach = -(-len(noise) // (most // 2 - 1))
    kept_high, kept_low = np.full(len(noise), -np.inf), np.full(len(noise), np.inf)
    places = thin.steps.astype(int) - 1
    kept_high[places] = kept_low[places] = thin.values
    for i in range(0, len(noise), 7):
        near = slice(max(i - reach, 0), i + reach + 1)
        assert kept_low[near].min() <= noise[i] <= kept_high[near].max()


def test_a_spike_of_one_step_is_never_lost(noise: np.ndarray) -> None:
    for place in (0, 1, 5_000, 11_111, len(noise) - 1):
        spiked = noise.copy()
        spiked[place], spiked[-1 - place] = 50.0, -50.0
        thin = curve(spiked).thin()
        assert (thin.values.max(), thin.values.min()) == (50.0, -50.0)


def test_short_curves_are_kept_whole(noise: np.ndarray) -> None:
    np.testing.assert_array_equal(curve(noise[:1000]).thin(1000).values, noise[:1000])
    assert len(curve(noise[:1001]).thin(1000).steps) <= 1000
    assert len(curve(noise[:0]).thin().steps) == 0


@pytest.mark.parametrize("n", [1, 2, 300, 3000])
def test_smoothing_is_a_weighted_mean_of_the_past(noise: np.ndarray, n: int) -> None:
    values = noise[:n] + 5
    keep = 1 - 1 / max(n / 100, 10)
    smooth = curve(values).smooth().values
    for t in {0, n // 2, n - 1}:
        weights = keep ** np.arange(t, -1, -1.0)
        assert smooth[t] == pytest.approx((weights * values[: t + 1]).sum() / weights.sum(), rel=1e-9)
    constant = curve(np.full(n, 3.25)).smooth().values
    np.testing.assert_allclose(constant, 3.25, rtol=1e-12)


def test_smoothing_forgets_a_spike() -> None:
    values = np.ones(20_000)
    values[100] = 1e30
    assert curve(values).smooth().values[-1] == pytest.approx(1.0)


def test_a_history_is_what_was_logged(tmp_path: Path) -> None:
    rows = [{"step": s, "epoch": round(s / 7, 4), "loss": 9.0 - s} for s in range(1, 15)]
    rows[6] |= {"knn": 0.5, "warning": "first\nsecond: lower --lr"}
    rows[9] |= {"loss": None, "skipped": 1.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    history = read_history(tmp_path)
    assert history.curves.keys() == {"loss", "knn", "skipped"}
    np.testing.assert_array_equal(history.curves["loss"].steps, range(1, 15))
    np.testing.assert_array_equal(history.curves["loss"].values, np.array([row["loss"] for row in rows], float))
    np.testing.assert_array_equal(history.curves["loss"].finite().steps, [s for s in range(1, 15) if s != 10])
    assert (history.curves["knn"].steps.tolist(), history.curves["knn"].values.tolist()) == ([7.0], [0.5])
    assert history.warnings == [(7, "first"), (7, "second: lower --lr")]
    assert (history.step, history.epoch, history.steps_per_epoch) == (14, 2.0, 7)


@pytest.mark.parametrize(
    "damage",
    [b'{"step": 3, "loss": 1.0', b'{"step": 3, "loss": 1.0}', b"{", b"\n\n", b"[1]\n", b'"step"\n', b"\xff\xfe\n",
     b"{}\n", b'{"step": "3", "loss": 1.0}\n', b'{"loss": 1.0}\n', b"null\n", b'{"step": 3, "loss": \n', b"\x00" * 9],
)  # fmt: skip
def test_damaged_lines_are_passed_over(tmp_path: Path, damage: bytes) -> None:
    good = b'{"step": 1, "epoch": 0.5, "loss": 3.0}\n{"step": 2, "epoch": 1.0, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + damage)
    history = read_history(tmp_path)
    assert history.curves["loss"].values.tolist() == [3.0, 2.0]
    assert (history.step, history.steps_per_epoch) == (2, 2)


def test_values_that_are_no_numbers_make_no_curve(tmp_path: Path) -> None:
    line = '{"step": 1, "epoch": "x", "loss": "y", "warning": 3, "note": "?", "views": [1], "lr": 1e-3}\n'
    (tmp_path / "metrics.jsonl").write_text(line)
    history = read_history(tmp_path)
    assert history.curves.keys() == {"warning", "lr"}
    assert (history.warnings, history.epoch, history.steps_per_epoch) == ([], 0.0, None)


def test_no_metrics_are_an_empty_history(tmp_path: Path) -> None:
    history = read_history(tmp_path)
    assert (history.curves, history.warnings, history.step, history.epoch) == ({}, [], 0, 0.0)
    assert history.steps_per_epoch is None
