import json
import math
import random
from collections.abc import Sequence

import pytest

from patchsight_train.collapse import CollapseDetector, Signature

LOW = Signature({"loss": (0, 1)}, "The loss is low", "Try --lr 1")
POINT = Signature({"rankme": (0, 2), "feature_std": (0, 0.5)}, "All in one point", "Try --lr 2", lasting=False)


def named(detector: CollapseDetector, losses: Sequence[float]) -> list[int]:
    """The steps at which something is said."""
    return [step for step, loss in enumerate(losses, 1) if detector.see(step, {"loss": loss})]


def slow(held: list[bool], patience: int) -> list[int]:
    """Word for word: named when it holds, and did in nine tenths of the last steps; then once more only after it did
    in no more than a tenth of them."""
    steps, free = [], True
    for step in range(1, len(held) + 1):
        last = held[max(step - patience, 0) : step]
        if free and last[-1] and sum(last) >= 0.9 * patience:
            steps.append(step)
            free = False
        elif not free and sum(last) <= (1 - 0.9) * patience:
            free = True
    return steps


@pytest.mark.parametrize("patience", [1, 7, 20, 50])
def test_a_signature_is_named_as_the_rule_says(patience: int) -> None:
    rng = random.Random(patience)
    held: list[bool] = []
    while len(held) < 2000:  # stretches with a share of their own, so that the rule's edges are met
        share = rng.choice([0, 0.05, 0.5, 0.92, 1])
        held += [rng.random() < share for _ in range(rng.randrange(2 * patience + 2))]
    found = named(CollapseDetector([LOW], patience), [0.5 if x else 1.5 for x in held])
    assert found == slow(held, patience)
    assert len(found) > 3


def test_one_spike_hides_nothing_and_one_dip_is_nothing() -> None:
    assert named(CollapseDetector([LOW], 20), [0.5] * 10 + [9.0] + [0.5] * 30) == [19]
    assert named(CollapseDetector([LOW], 20), [9.0] * 10 + [0.5] * 17 + [9.0] * 30) == []


def test_nothing_is_expected_up_to_the_start() -> None:
    assert named(CollapseDetector([LOW], 10, start=30), [0.5] * 50) == [39]
    assert named(CollapseDetector([LOW], 10, start=30), [0.5] * 30 + [1.5] * 20) == []


def test_all_bounds_must_hold_and_an_evaluation_counts_once() -> None:
    detector = CollapseDetector([POINT], 50)
    assert detector.see(1, {"loss": 3.0}) is None
    assert detector.see(2, {"loss": 3.0, "rankme": 1.5, "feature_std": 0.6}) is None
    assert detector.see(3, {"loss": 3.0, "rankme": 2.5, "feature_std": 0.1}) is None
    assert detector.see(4, {"loss": 3.0, "rankme": 1.25, "feature_std": 0.1}) == (
        "All in one point (rankme 1.25, feature_std 0.1). Try --lr 2."
    )
    assert detector.see(5, {"loss": 3.0}) is None
    assert detector.see(6, {"loss": 3.0, "rankme": 1.2, "feature_std": 0.1}) is None  # it was named
    assert detector.see(7, {"loss": 3.0, "rankme": 9.0, "feature_std": 0.9}) is None  # and is left
    assert detector.see(8, {"loss": 3.0, "rankme": 1.2, "feature_std": 0.1}) is not None


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_skipped_step_neither_holds_nor_does_not(poison: float) -> None:
    losses = [0.5] * 10 + [poison] * 100 + [0.5] * 10
    assert named(CollapseDetector([LOW], 20), losses) == [118]


def test_the_change_of_the_loss_and_what_a_teacher_tells_are_derived() -> None:
    still = Signature({"loss_change": (0, 1e-5)}, "Still", "Move")
    assert named(CollapseDetector([still], 10), [2.0 + 1e-6 * (-1) ** i for i in range(20)]) == [10]
    assert named(CollapseDetector([still], 10), [2.0 + 1e-3 * (-1) ** i for i in range(20)]) == []
    mute = Signature({"teacher_information": (-1, 0.02)}, "Mute", "Speak", lasting=False)
    detector = CollapseDetector([mute], 10)
    assert detector.see(1, {"loss": 1.0, "teacher_entropy": 2.0, "teacher_mean_entropy": 2.5}) is None
    assert detector.see(2, {"loss": 1.0, "teacher_entropy": 2.0, "teacher_mean_entropy": 2.01}) == (
        "Mute (teacher_information 0.01). Speak."
    )


def test_of_the_lasting_ones_the_first_is_named_until_it_is_left() -> None:
    small = Signature({"loss": (0, 0.6)}, "The loss is small", "Try --lr 3")
    detector = CollapseDetector([small, LOW], 10)
    texts = [detector.see(step, {"loss": loss}) for step, loss in enumerate([0.5] * 20 + [0.9] * 20 + [1.5] * 20, 1)]
    assert [step for step, text in enumerate(texts, 1) if text] == [9]
    assert "small" in (texts[8] or "")
    again = [detector.see(step, {"loss": 0.9}) for step in range(61, 81)]
    assert [step for step, text in enumerate(again, 61) if text] == [69]
    assert "low" in (again[8] or "")


def test_what_begins_at_the_same_step_is_all_said() -> None:
    detector = CollapseDetector([LOW, POINT], 1)
    text = detector.see(1, {"loss": 0.5, "rankme": 1.0, "feature_std": 0.0})
    assert text == "The loss is low (loss 0.5). Try --lr 1.\nAll in one point (rankme 1, feature_std 0). Try --lr 2."


@pytest.mark.parametrize("stop", [1, 13, 55, 80, 300, 399])
def test_a_resumed_run_is_told_what_an_uninterrupted_one_is(stop: int) -> None:
    rng = random.Random(3)
    rows = []
    for step in range(1, 401):
        row = {"step": step, "loss": rng.choice([0.5, 0.5, 0.5, 1.5]) if step % 100 > 40 else 0.5 + rng.random() / 2}
        if step % 25 == 0:
            row |= {"rankme": rng.uniform(1, 3), "feature_std": rng.random()}
        rows.append(row)

    def said(detector: CollapseDetector, rows: list[dict[str, float]]) -> list[str | None]:
        return [detector.see(int(row["step"]), {k: v for k, v in row.items() if k != "step"}) for row in rows]

    whole = said(CollapseDetector([LOW, POINT], 20, 10), rows)
    assert sum(text is not None for text in whole) > 4
    resumed = CollapseDetector([LOW, POINT], 20, 10)
    for row, text in zip(rows[:stop], whole, strict=False):
        line = json.dumps(row | ({"warning": text} if text else {}))
        resumed.see(json.loads(line)["step"], json.loads(line))
    assert said(resumed, rows[stop:]) == whole[stop:]
