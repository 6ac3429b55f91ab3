"""The verdict on a precision, by numbers that are known beforehand."""

import time
from typing import Any

import numpy as np
import pytest

from patchsight_export.agreement import Judges, agreement, check, cosine, knn, overlap, speed, table
from patchsight_serve.errors import BundleError
from patchsight_serve.nearest import normalize


class Answers:
    """A session that gives `values[name][i]` for the image whose first pixel is i."""

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self.values = values

    def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [self.values[name][feed["image"][:, 0, 0, 0]] for name in names]


def judges(count: int, labels: np.ndarray | None = None) -> Judges:
    return Judges(np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3), labels)


def figures(least: float, mean: float) -> dict[str, Any]:
    return {"images": 9, "cosine": {"mean_embedding": {"least": least, "mean": mean}}}


def test_cosine_is_of_all_numbers_of_a_row() -> None:
    a = np.array([[[1, 0], [0, 0]], [[3, 0], [0, 4]]], np.float32)
    b = np.array([[[1, 0], [0, 1]], [[3, 0], [0, 4]]], np.float32)
    np.testing.assert_allclose(cosine(a, b), [0.5**0.5, 1], rtol=1e-6)


def test_overlap_leaves_the_image_itself_out() -> None:
    """On a circle each has its five neighbors left and right; a mirrored set keeps them, a shuffled one does not."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    assert overlap(circle, circle * np.array([1, -1], np.float32)) == 1
    halved = np.stack([np.cos(angle), np.sin(angle), 100 * (np.arange(60) % 2)], axis=1).astype(np.float32)
    # Every other one is far away now: of the ten, the four at an even distance stay.
    assert overlap(circle, normalize(halved)) == pytest.approx(0.4)


def test_knn_is_of_labelled_images_against_the_others() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, -1], 30)
    centers = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    near = normalize(centers[labels] + 0.1 * random.normal(size=(90, 3)).astype(np.float32))
    found = knn(near, normalize(random.normal(size=(90, 3)).astype(np.float32)), labels)
    assert found["knn"]["images"] == 60
    assert found["knn"]["fp32"] == 1
    assert found["knn"]["accuracy"] < 1
    assert knn(near, near, None) == {}
    assert knn(near, near, np.full(90, -1)) == {}


def test_all_figures_of_two_encoders() -> None:
    random = np.random.default_rng(0)
    full = {name: random.normal(size=(40, 8)).astype(np.float32) for name in ("cls_embedding", "mean_embedding")}
    low = full | {"mean_embedding": full["mean_embedding"] + 0.01 * random.normal(size=(40, 8)).astype(np.float32)}
    outputs = {"cls_embedding": (8,), "mean_embedding": (8,)}
    found = agreement(Answers(full), Answers(low), outputs, "mean_embedding", judges(40))  # type: ignore[arg-type]
    expected = cosine(full["mean_embedding"], low["mean_embedding"])
    assert found["cosine"]["cls_embedding"] == {"least": 1, "mean": 1}
    assert found["cosine"]["mean_embedding"]["least"] == pytest.approx(expected.min(), abs=1e-6)
    assert found["cosine"]["mean_embedding"]["mean"] == pytest.approx(expected.mean(), abs=1e-6)
    assert 0.8 < found["top10_overlap"] < 1
    assert "knn" not in found
    told = table("fp16", found | {"bytes": 500_000, "fp32_bytes": 1_000_000})
    assert "0.50, fp32 1.00: 0.50×" in told
    assert f"least {expected.min():.6f}" in told


def test_a_value_that_is_not_finite() -> None:
    full = {"mean_embedding": np.ones((40, 8), np.float32)}
    low = {"mean_embedding": np.ones((40, 8), np.float32)}
    low["mean_embedding"][35, 2] = np.inf
    with pytest.raises(BundleError, match="mean_embedding is not finite on images 32 to 39"):
        agreement(Answers(full), Answers(low), {"mean_embedding": (8,)}, "mean_embedding", judges(40))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("precision", "least", "mean", "told"),
    [
        ("fp16", 0.9991, 0.9991, None),
        ("fp16", 0.9989, 0.9999, "the least cosine of mean_embedding to fp32 is 0.9989"),
        ("bf16", 0.9989, 0.9999, "over 9 images, the limit 0.999"), ("int8", 0.5, 0.981, None),
        ("int8", 0.5, 0.979, "the mean cosine of mean_embedding to fp32 is 0.9790 over 9 images, the limit 0.98"),
        ("int8", np.nan, np.nan, "is nan"),
    ],
)  # fmt: skip
def test_limits(precision: str, least: float, mean: float, told: str | None) -> None:
    if told is None:
        check(precision, figures(least, mean))
    else:
        with pytest.raises(BundleError, match=told):
            check(precision, figures(least, mean))


def test_speed_is_a_ratio_of_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchsight_export.agreement.ROUND_S", 0.02)

    def busy(seconds: float) -> None:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    assert speed(lambda: busy(0.01), lambda: busy(0.005)) == pytest.approx(2, rel=0.2)
