import math
from collections.abc import Callable
from itertools import groupby
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from patchsight_train.data import Images
from patchsight_train.judge import robustness
from patchsight_train.judge.robustness import (
    CLEAN,
    PERTURBATIONS,
    Perturbation,
    Robustness,
    drift,
    mean_distance,
    measure,
    robustness_chart,
)
from patchsight_train.probe import knn_predict


def raw(pixels: Tensor) -> Tensor:
    """The simplest encoder: the pixels themselves, about gray."""
    return F.normalize(pixels.flatten(1).float() / 255 - 0.5, dim=1)


@pytest.fixture(scope="module")
def halves(photos: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embedded gallery, its labels, queries, their labels: 100 photos each."""
    assert photos.labels is not None
    return raw(photos.pixels[::2]), photos.labels[::2], photos.pixels[1::2], photos.labels[1::2]


@pytest.fixture(scope="module")
def rows(halves: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Robustness]:
    return measure(raw, *halves, k=5)


def test_figures_are_those_of_slow_loops(generator: Generator) -> None:
    x, y = torch.randn(2, 30, 7, generator=generator).unbind(0)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    a, b = x.double().numpy(), y.double().numpy()
    assert drift(x, y) == pytest.approx(np.mean([1 - cosine(a[i], b[i]) for i in range(30)]), rel=1e-12)
    pairs = [1 - cosine(a[i], a[j]) for i in range(30) for j in range(30) if i != j]
    assert mean_distance(x) == pytest.approx(np.mean(pairs), rel=1e-12)
    assert drift(x, x) == 0
    assert math.isnan(mean_distance(x[:1]))


def test_the_first_row_is_clean(rows: list[Robustness], halves: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    gallery, labels, queries, truth = halves
    expected = (knn_predict(gallery, labels, raw(queries), 5) == truth).double().mean().item()
    assert rows[0] == Robustness(CLEAN, 0, expected, 0, 0)
    assert [(row.name, row.strength) for row in rows[1:]] == [(p.name, p.strength) for p in PERTURBATIONS]


def test_rows_are_those_of_each_perturbation(
    rows: list[Robustness], halves: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    gallery, labels, queries, truth = halves
    clean, apart = raw(queries), mean_distance(raw(queries))
    for row, perturbation in zip(rows[1:], PERTURBATIONS, strict=True):
        x = raw(perturbation.apply(queries, Generator().manual_seed(0)))
        assert row.knn == pytest.approx((knn_predict(gallery, labels, x, 5) == truth).double().mean().item())
        assert row.drift == drift(clean, x)
        assert row.relative_drift == row.drift / apart


def test_drift_grows_with_strength(rows: list[Robustness]) -> None:
    for name, group in groupby(rows[1:], key=lambda row: row.name):
        drifts = [row.drift for row in group]
        assert drifts == sorted(drifts), name
        assert 0 < drifts[0] <= drifts[-1] < 2, name


def test_an_identity_moves_nothing(
    halves: tuple[Tensor, Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness, "PERTURBATIONS", (Perturbation("nothing", 0, lambda pixels, _: pixels),))
    clean, same = measure(raw, *halves)
    assert (same.drift, same.relative_drift, same.knn) == (0, 0, clean.knn)


def test_batches_and_order_change_nothing(
    halves: tuple[Tensor, Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness, "PERTURBATIONS", tuple(p for p in PERTURBATIONS if p.name in ("jpeg", "crop")))
    gallery, labels, queries, truth = halves
    whole = measure(raw, *halves)
    monkeypatch.setattr(robustness, "BATCH", 7)
    order = torch.randperm(100, generator=Generator().manual_seed(2))
    pieces = measure(raw, gallery, labels, queries[order], truth[order])
    for a, b in zip(whole, pieces, strict=True):
        assert (a.name, a.strength, a.knn) == (b.name, b.strength, b.knn)
        assert (a.drift, a.relative_drift) == pytest.approx((b.drift, b.relative_drift), rel=1e-9)


def test_the_seed_is_of_the_noise_alone(rows: list[Robustness], halves: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    again, other = measure(raw, *halves, k=5), measure(raw, *halves, k=5, seed=1)
    assert again == rows
    assert {row.name for row, new in zip(rows, other, strict=True) if row.drift != new.drift} == {"noise"}


def test_unknown_labels_leave_only_drift(halves: tuple[Tensor, Tensor, Tensor, Tensor], rows: list[Robustness]) -> None:
    gallery, labels, queries, truth = halves
    none = torch.full((100,), -1)
    for found in (measure(raw, gallery, none, queries, truth), measure(raw, gallery, labels, queries, none)):
        assert all(math.isnan(row.knn) for row in found)
        assert [row.drift for row in found] == [row.drift for row in rows]
    some = torch.where(torch.arange(100) < 50, truth, -1)
    half = measure(raw, gallery, labels, queries, some, k=5)
    assert half[0].knn == measure(raw, gallery, labels, queries[:50], truth[:50], k=5)[0].knn
    assert half[5].drift == rows[5].drift


def test_a_collapsed_encoder_has_no_relative_drift(halves: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    def point(pixels: Tensor) -> Tensor:
        return F.normalize(torch.ones(len(pixels), 4), dim=1)

    _, labels, queries, truth = halves
    found = measure(point, point(queries), labels, queries, truth)
    assert all(row.drift == 0 and math.isnan(row.relative_drift) for row in found)
    robustness_chart(found)


def test_progress_is_told_after_each_row(halves: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    calls: list[None] = []
    done: Callable[[], None] = lambda: calls.append(None)  # noqa: E731
    assert len(measure(raw, *halves, done=done)) == len(calls) == len(PERTURBATIONS) + 1


def test_a_panel_for_each_perturbation(rows: list[Robustness]) -> None:
    panels = list(ElementTree.fromstring(f"<div>{robustness_chart(rows)}</div>"))
    names = [name for name, _ in groupby(rows[1:], key=lambda row: row.name)]
    assert len(panels) == len(names) == 12
    assert set(names) == set(robustness.HEADINGS)
    for panel, name in zip(panels, names, strict=True):
        shown = [rows[0], *(row for row in rows if row.name == name)]
        knn, drifts = (path.attrib["d"].removeprefix("M").split("L") for path in panel.iter("path"))
        heights = [(100 - float(point.split()[1]) / 10) for point in knn]
        np.testing.assert_allclose(heights, [100 * row.knn for row in shown], atol=0.01)
        heights = [(100 - float(point.split()[1]) / 10) for point in drifts]
        np.testing.assert_allclose(heights, [100 * row.relative_drift for row in shown], atol=0.01)
        assert [hint.text for hint in panel.iter("title")][0].startswith("clean: 20-NN")  # type: ignore[union-attr]


def test_panels_without_labels_show_drift_alone(rows: list[Robustness]) -> None:
    unlabelled = [Robustness(r.name, r.strength, math.nan, r.drift, 3 * r.relative_drift) for r in rows]
    panels = list(ElementTree.fromstring(f"<div>{robustness_chart(unlabelled)}</div>"))
    for panel in panels:
        (path,) = panel.iter("path")
        assert all(0 <= float(point.split()[1]) <= 1000 for point in path.attrib["d"].removeprefix("M").split("L"))
