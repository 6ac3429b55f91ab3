import math

import pytest

from patchsight_train.schedule import cosine, warmup_cosine


@pytest.mark.parametrize(("total", "warmup", "final"), [(100, 10, 0.0), (100, 0, 1e-6), (7, 3, 0.2)])
def test_warmup_and_cosine_against_the_closed_form(total: int, warmup: int, final: float) -> None:
    for step in range(total + 1):
        if step < warmup:
            expected = 0.5 * (step + 1) / warmup
        else:
            expected = final + (0.5 - final) * math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2
        assert warmup_cosine(step, total, warmup, 0.5, final) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_warmup_ends_at_the_peak_and_wastes_no_step() -> None:
    assert warmup_cosine(0, 100, 10, 1.0) == pytest.approx(0.1)
    assert warmup_cosine(9, 100, 10, 1.0) == 1.0
    assert warmup_cosine(10, 100, 10, 1.0) == 1.0
    assert warmup_cosine(99, 100, 10, 1.0) > 0
    assert warmup_cosine(100, 100, 10, 1.0, 0.25) == 0.25


def test_warmup_longer_than_the_training_only_rises() -> None:
    rates = [warmup_cosine(step, 5, 10, 1.0) for step in range(5)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_cosine_may_rise_and_stays_at_its_end() -> None:
    assert cosine(0, 40, 0.04, 0.4) == pytest.approx(0.04)
    assert cosine(10, 40, 0.04, 0.4) == pytest.approx(0.4 - 0.36 * (2 + math.sqrt(2)) / 4)
    assert cosine(20, 40, 0.04, 0.4) == pytest.approx(0.22)
    assert cosine(40, 40, 0.04, 0.4) == cosine(1000, 40, 0.04, 0.4) == pytest.approx(0.4)
