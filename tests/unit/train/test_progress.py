import numpy as np

from patchsight_train.history import Curve, History
from patchsight_train.progress import Progress

CONFIG = {"epochs": 16, "batch_size": 256}


def history(step: int, epoch: float, *speeds: float) -> History:
    values = np.array(speeds)
    curves = {"images_per_s": Curve(np.arange(1.0, len(values) + 1), values)} if speeds else {}
    return History(curves, [], step, epoch)


def test_how_far_and_how_long() -> None:
    found = Progress.of(history(1560, 8.0, 100.0, 128.0, 200.0), CONFIG)
    assert (found.total_steps, found.share, found.short, found.complete) == (3120, 0.5, "50 %", False)
    assert found.seconds_left == 1560 * 256 / 128
    assert found.sentence == "Epoch 8 of 16 · step 1,560 of 3,120 · 128 images/s · about 52 min left"


def test_the_end() -> None:
    found = Progress.of(history(3120, 16.0, 200.0), CONFIG)
    assert found.complete
    assert (found.short, found.sentence) == ("done", "Complete: 16 epochs · 3,120 steps · 200 images/s")
    assert not Progress.of(history(3119, 15.9949, 200.0), CONFIG).complete


def test_speed_is_that_of_late() -> None:
    """The first steps compile and warm up; one odd step is no trend."""
    speeds = [1.0] * 150 + [800.0] * 99 + [5.0]
    assert Progress.of(history(250, 1.0, *speeds), CONFIG).images_per_s == 800.0


def test_what_is_unknown_is_not_claimed() -> None:
    nothing = Progress.of(history(0, 0.0), {})
    assert (nothing.sentence, nothing.short, nothing.complete) == ("Nothing is logged yet.", "", False)
    assert Progress.of(history(30, 0.5), {}).sentence == "Epoch 0.5 · step 30"
    assert Progress.of(history(30, 0.5, float("nan")), CONFIG).sentence == "Epoch 0.5 of 16 · step 30 of 960"
    # One step an epoch: fewer images than a batch, so nobody knows how many.
    assert Progress.of(history(4, 4.0, 90.0), CONFIG).sentence == "Epoch 4 of 16 · step 4 of 16 · 90.0 images/s"
