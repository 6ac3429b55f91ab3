"""Speeds and numbers of two engines: fakes of known ones, on a clock of their own."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.trial import Trial, compare
from patchsight_serve.trial_record import TrialRecord


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Paced(FakeEncoder):
    """Takes a fixed time per image, and gives numbers that are `changed`."""

    def __init__(self, clock: Clock, image_s: float, changed: float = 0.0, **shape: bool) -> None:
        super().__init__(**shape)  # type: ignore[arg-type]
        self.clock, self.image_s, self.changed, self.runs = clock, image_s, changed, 0
        self.seen: list[tuple[int, ...]] = []

    def run(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        self.runs += 1
        # Every third run is held up by something else.
        self.clock.now += self.image_s * len(images) * (7 if self.runs % 3 == 0 else 1)
        self.seen.append(images.shape)
        return {name: self._change(value) for name, value in super().run(images, outputs).items()}

    def _change(self, values: np.ndarray) -> np.ndarray:
        """The first value of all, by a share of the largest one."""
        other = values.copy()
        other.flat[0] += self.changed * np.abs(values).max()
        return other


@pytest.mark.parametrize("times", [0.5, 1.0, 1.25, 2.0])
def test_the_speed_is_the_ratio_of_the_undisturbed_runs(times: float) -> None:
    clock = Clock()
    trial = compare(Paced(clock, 0.04), Paced(clock, 0.04 / times), clock=clock)
    assert trial.speed == pytest.approx(times, rel=1e-6)
    assert (trial.difference, trial.cosine) == (0.0, pytest.approx(1.0))


def test_a_trial_keeps_to_its_time() -> None:
    clock = Clock()
    compare(Paced(clock, 0.0005), Paced(clock, 0.0005), seconds=1.0, clock=clock)
    assert 0.9 < clock.now < 3


def test_a_slow_encoder_has_two_rounds_and_no_more() -> None:
    clock = Clock()
    slow = Paced(clock, 5.0)
    compare(slow, Paced(clock, 5.0), seconds=0.001, clock=clock)
    batches = [shape[0] for shape in slow.seen[2:]]  # after noise and photos
    assert batches == [1, 1, 1, 8, 8, 8]  # one that warms up, and two rounds


def test_the_worst_number_counts() -> None:
    clock = Clock()
    trial = compare(Paced(clock, 1.0), Paced(clock, 1.0, changed=0.25), clock=clock)
    assert trial.difference == pytest.approx(0.25)
    # cos of an embedding with one more component, against itself
    assert 0.9 < trial.cosine < 0.9999


def test_a_number_that_is_none_is_never_within_a_limit() -> None:
    clock = Clock()
    trial = compare(Paced(clock, 1.0), Paced(clock, 1.0, changed=float("nan")), clock=clock)
    assert np.isnan(trial.difference)
    assert np.isnan(trial.cosine)


def test_other_sizes_are_tried_where_the_graph_takes_them() -> None:
    clock = Clock()
    encoder = Paced(clock, 1.0, dynamic_size=True)
    compare(encoder, Paced(clock, 1.0, dynamic_size=True), clock=clock)
    assert {shape[1:3] for shape in encoder.seen} == {(32, 32), (16, 16), (48, 48), (52, 16)}


TRIAL = Trial(speed=1.5, difference=1e-6, cosine=0.9999)


def test_a_trial_is_found_again(tmp_path: Path) -> None:
    record = TrialRecord(tmp_path / "state" / "engines.json")
    assert record.get("a") is None
    record.put("a", TRIAL)
    record.put("b", Trial(0.5, float("nan"), float("nan")))
    again = TrialRecord(tmp_path / "state" / "engines.json")
    assert again.get("a") == TRIAL
    damaged = again.get("b")
    assert damaged is not None
    assert np.isnan(damaged.difference)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["engines.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 3}', '{"a": {"speed": "fast"}}', '{"a": {"speed": 1}}'])
def test_a_damaged_record_costs_a_trial(tmp_path: Path, content: str) -> None:
    path = tmp_path / "engines.json"
    path.write_text(content)
    record = TrialRecord(path)
    assert record.get("a") is None
    record.put("a", TRIAL)
    assert record.get("a") == TRIAL
    assert json.loads(path.read_text())["a"]["speed"] == 1.5


def test_a_record_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    record = TrialRecord(tmp_path / "file" / "engines.json")
    record.put("a", TRIAL)
    assert "could not be kept" in caplog.text
