import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from patchsight_train.judge.ranking import (
    BOTH,
    LABEL_FREE,
    Point,
    rank_correlations,
    ranking_chart,
    ranks,
    read_points,
    spearman,
)


@pytest.mark.parametrize("n", [3, 10, 200])
@pytest.mark.parametrize("values", [2, 5, 10_000])
def test_spearman_is_scipys(n: int, values: int) -> None:
    rng = np.random.default_rng(n + values)
    for _ in range(20):
        x, y = rng.integers(0, values, n).astype(float), rng.integers(0, values, n).astype(float)
        y += rng.integers(0, 2) * x
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            assert math.isnan(spearman(x, y))
            continue
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        np.testing.assert_array_equal(ranks(x), stats.rankdata(x))


def test_spearman_by_hand() -> None:
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -(x**3)) == pytest.approx(-1)
    assert math.isnan(spearman(x[:2], x[:2]))
    assert math.isnan(spearman(x[:0], x[:0]))


def write(run: Path, rows: list[dict[str, float | None]]) -> Path:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def evaluation(step: int, knn: float, **others: float | None) -> dict[str, float | None]:
    measures = {"rankme": 10 * knn, "alignment": -knn, "uniformity": 3 * knn, "feature_std": 0.5}
    return {"step": step, "loss": 1 / step, "lr": 0.1, "knn": knn, "linear_probe": 1 - knn, **measures, **others}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    first = [{"step": 1, "loss": 3.0}, evaluation(2, 0.3), {"step": 3, "loss": 2.0}, evaluation(4, 0.2)]
    second = [evaluation(step, step / 10) for step in range(1, 6)]
    return [write(tmp_path / "one", first), write(tmp_path / "two", second), tmp_path / "none"]


def test_every_evaluation_is_a_point(runs: list[Path]) -> None:
    points = read_points(runs)
    assert [(p.run, p.step) for p in points] == [("one", 2), ("one", 4), *(("two", step) for step in range(1, 6))]
    expected = {name: x for name, x in evaluation(2, 0.3).items() if name not in ("step", "loss", "lr")}
    assert points[0].values == expected
    assert points[0].value(BOTH) == pytest.approx(-0.3 + 0.9)
    assert points[0].value("step") == 2
    assert math.isnan(points[0].value("unheard of"))


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / where / "run", [evaluation(1, 0.5)]) for where in "ab"]
    assert [point.run for point in read_points(folders)] == [str(folder) for folder in folders]


def test_correlations_over_all_and_within_each_run(runs: list[Path]) -> None:
    points = read_points(runs)
    found = rank_correlations(points)
    assert list(found) == [f"{name}{where}" for where in ("", " in one", " in two") for name in LABEL_FREE]
    assert found["rankme"] == found["uniformity in two"] == pytest.approx(1)
    assert found["alignment"] == found["alignment in two"] == pytest.approx(-1)
    assert math.isnan(found["feature_std"])  # never changes
    assert math.isnan(found["rankme in one"])  # two points
    knn, step = (np.array([p.value(name) for p in points]) for name in ("knn", "step"))
    assert found["step"] == pytest.approx(stats.spearmanr(step, knn).statistic)
    assert found["step in two"] == pytest.approx(1)
    assert rank_correlations(points, "linear_probe")["rankme"] == pytest.approx(-1)
    assert rank_correlations(points[::-1])["step"] == pytest.approx(found["step"])


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    rows = [evaluation(step, 0.1 * step, rankme=None if step == 3 else -step) for step in range(1, 7)]
    rows[4].pop("knn")
    found = rank_correlations(read_points([write(tmp_path / "run", rows)]))
    assert found["rankme"] == pytest.approx(-1)
    assert all(math.isnan(rho) for rho in rank_correlations([]).values())
    assert all(math.isnan(rho) for rho in rank_correlations([Point("old", 3, {"knn": 0.4})]).values())


def test_a_chart_for_each_measure(runs: list[Path]) -> None:
    points = read_points(runs)
    charts = list(ElementTree.fromstring(f"<div>{ranking_chart(points)}</div>"))
    assert len(charts) == len(LABEL_FREE)
    for chart, name in zip(charts, LABEL_FREE, strict=True):
        dots = list(chart.iter("circle"))
        assert len(dots) == len(points)
        x = [float(dot.attrib["cx"].removesuffix("%")) for dot in dots]
        assert spearman(np.array(x), np.array([p.value(name) for p in points])) > 0.999 or name == "feature_std"
        assert [dot.attrib["class"] for dot in dots] == ["c0"] * 2 + ["c1"] * 5
        assert dots[0].find("title").text.startswith("one, step 2: ")  # type: ignore[union-attr]
    assert ranking_chart([]) == ranking_chart([Point("old", 3, {"linear_probe": 0.4})]) == ""


def test_a_run_has_one_color_in_all_charts() -> None:
    points = [Point("old", step, {"knn": 0.1 * step}) for step in range(3)]
    points += [Point("new", step, {"knn": 0.1 * step, "rankme": 5.0 + step}) for step in range(3)]
    rankme, steps = ElementTree.fromstring(f"<div>{ranking_chart(points)}</div>")
    assert {dot.attrib["class"] for dot in rankme.iter("circle")} == {"c1"}
    assert [dot.attrib["class"] for dot in steps.iter("circle")] == ["c0"] * 3 + ["c1"] * 3
