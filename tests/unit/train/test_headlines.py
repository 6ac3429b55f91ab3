import re

import numpy as np

from patchsight_train.headlines import tiles, warnings
from patchsight_train.history import Curve, History


def history(**curves: list[float]) -> History:
    """Metrics at steps 100, 200, …; an epoch has 50 steps."""
    made = {name: Curve(100.0 * np.arange(1, len(v) + 1), np.array(v)) for name, v in curves.items()}
    step = 100 * max((len(v) for v in curves.values()), default=0)
    return History(made, [], step, step / 50)


def words(html: str) -> list[str]:
    return [word for word in re.split(r"<[^>]+>", html) if word.strip()]


def test_tiles_tell_the_newest_values_and_the_best() -> None:
    logged = history(loss=[6.0, 6.0, 6.0], knn=[0.4, 0.5, 0.45], linear_probe=[0.3, 0.4, 0.5], rankme=[9.0, 41.25])
    found = tiles(logged, {"backbone": "vit-small", "image_size": 32})
    assert words(found) == [
        "Loss", "6.000", "from 6.000", "20-NN", "45.0 %", "best 50.0 %, epoch 4", "Linear probe", "50.0 %",
        "the best so far", "RankMe", "41.2", "of 384 dimensions", "Skipped steps", "0", "all were finite",
    ]  # fmt: skip


def test_skipped_steps_are_counted() -> None:
    found = tiles(history(loss=[1.0, float("nan")], skipped=[1.0, 1.0]), {})
    assert words(found) == ["Loss", "1.000", "from 1.000", "Skipped steps", "2", "not finite"]
    assert 'class="bad"' in found


def test_nothing_logged_has_no_tiles() -> None:
    assert tiles(history(), {}) == ""
    assert words(tiles(history(loss=[float("nan")]), {})) == ["Skipped steps", "0", "all were finite"]


def test_warnings_are_shown_once_with_their_time() -> None:
    logged = history(loss=[1.0])
    logged.warnings.append((100, "ln K: lower --teacher-temperature"))
    logged.warnings.extend((step, "rank < 2") for step in (150, 200, 900))
    found = warnings(logged)
    assert words(found) == [
        "This run shows signs of collapse", "ln K: lower ", "--teacher-temperature", "at epoch 2 (step 100)",
        "rank &lt; 2", "3 times, from epoch 3 (step 150) to epoch 18 (step 900)",
    ]  # fmt: skip
    assert "<code>--teacher-temperature</code>" in found


def test_the_newest_of_many_warnings_are_shown() -> None:
    logged = history(loss=[1.0])
    logged.warnings.extend((step, f"warning {step}") for step in range(1, 9))
    shown = words(warnings(logged))
    assert [w for w in shown if w.startswith("warning")] == [f"warning {step}" for step in range(4, 9)]
    assert shown[-1] == "and 3 earlier ones in metrics.jsonl"


def test_no_warnings_are_no_box() -> None:
    assert warnings(history(loss=[1.0])) == ""
