"""Seconds per image by the answers, on a clock of the test's own."""

import pytest

from patchsight_serve import pace
from patchsight_serve.pace import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return now


def test_nothing_is_known_before_the_first_answer(clock: list[float]) -> None:
    it = Pace()
    it.left(3)
    clock[0] += 5
    it.came(3, answered=False)
    assert it.seconds_per_image is None
    assert it.in_flight == 0


def test_idle_time_is_no_work(clock: list[float]) -> None:
    it = Pace()
    for _ in range(3):
        it.left(1)
        clock[0] += 0.01
        it.came(1, answered=True)
        clock[0] += 50
    assert it.seconds_per_image == pytest.approx(0.01)


def test_requests_that_wait_together_are_not_counted_twice(clock: list[float]) -> None:
    """64 requests of one image leave at once and come back at once, after 0.64 s: 10 ms an image, though each of them
    took 64 times as long."""
    it = Pace()
    for _ in range(64):
        it.left(1)
    clock[0] += 0.64
    for _ in range(64):
        it.came(1, answered=True)
    assert it.seconds_per_image == pytest.approx(0.01)
