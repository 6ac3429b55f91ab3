import random

import pytest

from patchsight_train.trace import BARS, SmoothedLoss, Trace


def test_the_mean_is_free_of_bias_and_forgets() -> None:
    loss = SmoothedLoss()
    loss.add(7.0)
    assert loss.value == pytest.approx(7.0)
    for _ in range(1000):
        loss.add(2.0)
    assert loss.value == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000, 4096])
def test_a_trace_is_the_means_of_equal_pieces(n: int) -> None:
    rng = random.Random(n)
    values = [rng.random() for _ in range(n)]
    trace = Trace(32)
    for x in values:
        trace.add(x)
    assert 1 <= len(trace.means) < 32
    pieces = [values[i : i + trace.stride] for i in range(0, n, trace.stride)]
    whole = [sum(piece) / len(piece) for piece in pieces if len(piece) == trace.stride]
    assert trace.means == pytest.approx(whole)


def test_bars_go_from_the_least_to_the_largest() -> None:
    trace = Trace()
    assert trace.sparkline() == ""
    for x in range(8, 0, -1):
        trace.add(float(x))
    assert trace.sparkline() == BARS[::-1]
    flat = Trace()
    flat.add(3.0)
    flat.add(3.0)
    assert flat.sparkline() == BARS[0] * 2
