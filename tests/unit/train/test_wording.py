import math

import pytest

from patchsight_train.wording import duration, measure, number, titled, value


@pytest.mark.parametrize(
    ("x", "text"),
    [(0, "0"), (2.99588, "2.996"), (0.79297, "0.7930"), (12345.6, "12,346"), (821.26, "821.3"), (-2.3164, "-2.316"),
     (8.2e-5, "8.20e-05"), (1.5e9, "1.50e+09"), (math.nan, "nan"), (-math.inf, "-inf")],
)  # fmt: skip
def test_four_significant_digits(x: float, text: str) -> None:
    assert number(x) == text


def test_values_carry_their_unit() -> None:
    assert value("knn", 0.58149) == "58.1 %"
    assert value("images_per_s", 812.34) == "812 images/s"
    assert value("loss", 2.99588) == "2.996"
    assert (titled("linear_probe"), titled("knn")) == ("Linear probe", "20-NN")
    assert (measure("some_new_metric").label, measure("some_new_metric").factor) == ("some new metric", 1.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (3570, "1 h"), (3599, "1 h"), (12_000, "3 h 20 min"),
     (172_800, "2 d"), (190_000, "2 d 4 h")],
)  # fmt: skip
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text
