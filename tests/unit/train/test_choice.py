"""Settings in the making."""

import pytest

from patchsight_serve.errors import InvalidRequest
from patchsight_train.choice import ROUND, Choice, duration, power_of_two, round_down, with_values
from patchsight_train.objective_settings import SETTINGS, DINOSettings


def test_what_is_given_stays() -> None:
    choice = Choice(SETTINGS["dino"](data=["x"], epochs=7))
    choice.pick("because", epochs=3, seed=5)
    choice.pick("no more", seed=6, projection_hidden=1)  # the second is none of DINO's
    assert (choice.settings.epochs, choice.settings.seed) == (7, 5)
    assert choice.lines == ["seed 5: because"]
    assert choice.is_set("seed")
    assert not choice.is_set("lr")


def test_values_are_checked_together() -> None:
    settings = SETTINGS["dino"](data=["x"], width=96, heads=3)
    with pytest.raises(InvalidRequest, match="width 96 is not a multiple of heads 5"):
        with_values(settings, {"heads": 5})
    with pytest.raises(InvalidRequest, match="lr: "):
        with_values(settings, {"lr": -1.0})


def test_the_environment_does_not_overrule_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHSIGHT_TRAIN_WIDTH", "48")
    monkeypatch.setenv("PATCHSIGHT_TRAIN_SEED", "9")
    settings = DINOSettings.from_command_line("train", ["--data", "x", "--width", "96"])
    assert settings.model_fields_set == {"data", "width", "seed"}
    settings = with_values(settings, {"depth": 2})
    assert (settings.width, settings.depth, settings.seed) == (96, 2, 9)
    assert settings.model_fields_set == {"data", "width", "depth", "seed"}


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0, 9.99, 79, 80, 99, 100, 101, 119, 120, 799, 800, 999.9, 1000, 1e7])
def test_round_down(value: float) -> None:
    allowed = sorted(r * 10**k for r in ROUND for k in range(8))
    assert round_down(value) == max([a for a in allowed if a <= value], default=1)


def test_power_of_two() -> None:
    assert [power_of_two(v) for v in (0.2, 1, 2, 3, 4, 255, 256, 257.5)] == [1, 1, 2, 2, 4, 128, 256, 256]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "a minute"), (90, "2 min"), (3540, "59 min"), (3590, "1 h"), (6000, "1 h 40 min"), (7170, "2 h"),
        (86_400, "24 h"), (5 * 86_400, "5 days"),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
