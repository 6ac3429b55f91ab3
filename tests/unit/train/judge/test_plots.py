import math
from xml.etree import ElementTree

import numpy as np

from patchsight_train.judge.plots import Cloud, Places, ordered_chart, scatter_chart


def cloud(label: str, rank: int, *points: tuple[float, float]) -> Cloud:
    x, y = np.array(points, float).reshape(-1, 2).T
    return Cloud(label, rank, x, y, [f"{label} {i}" for i in range(len(points))])


def test_places_are_evenly_spaced() -> None:
    axis = Places.of(["clean", "a < b", "c"])
    assert axis.ticks() == [(0, "clean"), (1, "a &lt; b"), (2, "c")]
    assert axis.place(np.arange(3.0)).tolist() == [0, 0.5, 1]
    assert Places.of(["alone"]).place(np.zeros(1)).tolist() == [0]


def test_what_is_not_finite_is_left_out() -> None:
    lines = {"one": [10.0, math.nan, 30.0], "none": [math.nan] * 3, "inf": [math.inf, 5.0, 5.0]}
    figure = ElementTree.fromstring(ordered_chart("A & B", ["x", "y", "z"], lines, "of <x>", "%", 50))
    paths = {path.attrib["data-name"]: path.attrib["d"] for path in figure.iter("path")}
    assert paths == {"one": "M0.00 800.00L1000.00 400.00", "inf": "M500.00 900.00L1000.00 900.00"}
    assert [item.attrib["class"] for item in figure.iter("li")] == ["c0", "c2"]  # a line keeps its color
    assert [hint.text for hint in figure.iter("title")][:2] == ["x: one 10 %", "z: one 30 %"]
    assert ordered_chart("A", ["x"], {"none": [math.nan]}, "", "%", 1) == ""


def test_points_lie_where_they_are() -> None:
    clouds = [cloud("a<b", 0, (0, 0), (10, 100)), cloud("none", 1), cloud("c", 4, (5, 50))]
    figure = ElementTree.fromstring(scatter_chart("T", clouds, "x", "y"))
    dots = [(dot.attrib["class"], dot.find("title").text, dot.attrib["cx"]) for dot in figure.iter("circle")]  # type: ignore[union-attr]
    assert [(kind, hint) for kind, hint, _ in dots] == [("c0", "a<b 0"), ("c0", "a<b 1"), ("c1 past", "c 0")]
    across = [float(x.removesuffix("%")) for _, _, x in dots]
    assert across[2] == np.mean(across[:2])
    assert [item.text for item in figure.iter("li")] == ["a<b", "c"]
    assert scatter_chart("T", [cloud("none", 0)], "x", "y") == ""
