"""The charts' SVG is parsed, and its points turned back into the numbers that were drawn."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from patchsight_train.charts import Line, Mark, Reference, Scale, Span, fit, line_chart, plane_chart
from patchsight_train.history import Curve

SPAN = Span(last=400, steps_per_epoch=40)


def curve(*values: float, every: int = 1) -> Curve:
    return Curve(np.arange(1.0, len(values) + 1) * every, np.array(values))


def parse(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure)


def drawn(figure: str) -> dict[str, list[tuple[float, float]]]:
    """By line: the steps and values that its path stands for."""
    root = parse(figure)
    plot = root.find(".//div")
    assert plot is not None
    last, _ = (float(x) for x in plot.attrib["data-x"].split())
    low, high, log = (float(x) for x in plot.attrib["data-y"].split())
    found = {}
    for path in root.iter("path"):
        points = []
        for pair in path.attrib["d"].removeprefix("M").split("L"):
            x, y = (float(number) / 1000 for number in pair.split())
            points.append((x * last, low * (high / low) ** (1 - y) if log else low + (1 - y) * (high - low)))
        found[path.attrib["data-name"]] = points
    return found


def percent(text: str) -> float:
    return float(text.removesuffix("%")) / 100


def test_a_line_holds_the_data() -> None:
    values = [5.5, 4.25, 3.0, 3.5]
    figure = line_chart("Loss", [Line("mean", curve(*values, every=100))], SPAN)
    (points,) = drawn(figure).values()
    np.testing.assert_allclose(points, list(zip([100, 200, 300, 400], values, strict=True)), rtol=1e-4)


def test_a_logarithmic_line_holds_the_data() -> None:
    values = [1000.0, 10.0, 2.0, 0.1]
    figure = line_chart("Norm", [Line("mean", curve(*values, every=100))], SPAN, may_be_log=True)
    assert 'data-y="' in figure
    assert parse(figure).find(".//div").attrib["data-y"].endswith(" 1")  # type: ignore[union-attr]
    np.testing.assert_allclose([y for _, y in drawn(figure)["mean"]], values, rtol=1e-3)
    linear = line_chart("Norm", [Line("mean", curve(*values, every=100))], SPAN)
    np.testing.assert_allclose([y for _, y in drawn(linear)["mean"]], values, atol=0.02)


def test_long_lines_are_thinned_and_keep_their_extremes() -> None:
    values = np.random.default_rng(3).normal(size=50_000)
    values[12_345], values[40_000] = 99.0, -99.0
    whole = Curve(np.arange(1.0, 50_001), values)
    found = drawn(line_chart("x", [Line("raw", whole, faint=True), Line("mean", whole)], Span(50_000, 100)))
    for name, most in (("raw", 1000), ("mean", 500)):
        assert len(found[name]) <= most
        heights = [y for _, y in found[name]]
        assert (max(heights), min(heights)) == (pytest.approx(99.0, abs=0.01), pytest.approx(-99.0, abs=0.01))


def test_all_that_is_drawn_lies_inside() -> None:
    references = [Reference(8.0, "above"), Reference(-1.0, "below")]
    figure = line_chart("x", [Line("a", curve(1, 2, 3)), Line("b", curve(0.5, 7, 2), 1)], SPAN, references=references)
    numbers = [float(n) for path in parse(figure).iter("path") for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
    assert 0 <= min(numbers) <= max(numbers) <= 1000
    for element in parse(figure).iter():
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy"):
            if element.attrib.get(name, "").endswith("%"):
                assert 0 <= percent(element.attrib[name]) <= 1


def test_reference_lines_are_at_their_value() -> None:
    figure = line_chart("Loss", [Line("mean", curve(7, 6, 5))], SPAN, references=[Reference(math.log(4096), "ln K")])
    root = parse(figure)
    (group,) = [g for g in root.iter("g") if g.attrib["class"] == "reference"]
    low, high, _ = (float(x) for x in root.find(".//div").attrib["data-y"].split())  # type: ignore[union-attr]
    line, label = group.find("line"), group.find("text")
    assert line is not None
    assert label is not None
    assert low + (1 - percent(line.attrib["y1"])) * (high - low) == pytest.approx(8.3178, abs=1e-3)
    assert (line.attrib["y1"], label.text) == (line.attrib["y2"], "ln K")


def test_a_reference_is_named_where_the_lines_are_far() -> None:
    falling, rising = np.linspace(10, 0, 400), np.linspace(0, 10, 400)
    for values, anchor in ((falling, "end"), (rising, "start")):
        figure = line_chart("x", [Line("a", curve(*values))], SPAN, references=[Reference(10.0, "top")])
        (label,) = [e for g in parse(figure).iter("g") for e in g.iter("text")]
        assert label.attrib["text-anchor"] == anchor


def test_axes_are_labelled_in_epochs_and_units() -> None:
    figure = line_chart("Speed", [Line("a", curve(800, 812))], SPAN, unit="images/s")
    words = [e.text for e in parse(figure).iter("text")]
    assert {"epoch", "images/s", "0.0", "10.0"} <= set(words)
    assert "step" in [e.text for e in parse(line_chart("x", [Line("a", curve(1))], Span(3, None))).iter("text")]


def test_newest_values_and_a_description_are_told_in_words() -> None:
    lines = [Line("20-NN", curve(50, 58.149)), Line("linear probe", curve(60, 61), 1)]
    root = parse(line_chart("Classes", lines, SPAN, unit="%", note="Of 1 % only"))
    assert root.findtext(".//output") == "58.15 · 61 %"
    assert [e.text for e in root.iter("li")] == ["20-NN", "linear probe"]
    svg = root.find(".//svg")
    assert svg is not None
    assert svg.attrib["aria-label"] == "20-NN from 50 to 58.15; linear probe from 60 to 61"


def test_marks_are_at_their_step() -> None:
    figure = line_chart("x", [Line("a", curve(1, 2))], SPAN, marks=[Mark(100, 'bad "<b>"')])
    (mark,) = [e for e in parse(figure).iter("line") if e.attrib["class"] == "mark"]
    assert percent(mark.attrib["x1"]) == percent(mark.attrib["x2"]) == 0.25
    assert mark.findtext("title") == 'epoch 2.5: bad "<b>"'


def test_text_is_only_text() -> None:
    evil = '"><script>x</script>'
    figure = line_chart(evil, [Line(evil, curve(1, 2)), Line("b", curve(1, 2))], SPAN, unit=evil, note=evil,
                        references=[Reference(1, evil)])  # fmt: skip
    assert "<script" not in figure
    parse(figure)


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("x", [], SPAN) == ""
    assert line_chart("x", [Line("a", curve())], SPAN) == ""
    assert plane_chart("x", curve(), curve(), "a", "b", SPAN) == ""


def test_points_of_the_plane_are_at_their_values() -> None:
    x, y = curve(0.9, 0.5, 0.7, every=40), curve(-1.5, -2.0, -3.0, every=40)
    root = parse(plane_chart("Plane", x, y, "alignment", "uniformity", SPAN))
    dots = list(root.iter("circle"))
    across, up = (np.array([percent(d.attrib[name]) for d in dots]) for name in ("cx", "cy"))
    for places, curved in ((across, x), (1 - up, y)):  # a straight map of the values onto the box
        slope, start = np.polyfit(curved.values, places, 1)
        np.testing.assert_allclose(slope * curved.values + start, places, atol=1e-4)
        assert slope > 0
    assert dots[1].findtext("title") == "epoch 2: alignment 0.5, uniformity -2"


def test_the_plane_shows_what_both_have() -> None:
    x, y = Curve(np.array([1.0, 2, 3]), np.ones(3)), Curve(np.array([2.0, 3, 4]), np.ones(3))
    assert len(list(parse(plane_chart("x", x, y, "a", "b", SPAN)).iter("circle"))) == 2


@pytest.mark.parametrize(
    "values",
    [(3.0,), (0.0,), (-2.5, -2.5), (1e-6, 3e-6), (0.0, 1e6), (-1e-3, 1e3), (8.317, 8.3171), (1e30, 1e-30), (0, 5e-324),
     (5.0, 5.0 + 1e-12)],
)  # fmt: skip
@pytest.mark.parametrize("may_be_log", [True, False])
def test_axes_fit_any_values(values: tuple[float, ...], may_be_log: bool) -> None:
    scale = fit(np.array(values), may_be_log)
    assert scale.low < scale.high
    places = scale.place(np.array(values))
    assert ((places >= 0) & (places <= 1)).all()
    ticks = [v for v, _ in scale.ticks()]
    assert 1 <= len(ticks) <= 7
    assert all(scale.low * (1 - 1e-9) - 1e-300 <= v <= scale.high * (1 + 1e-9) for v in ticks if v >= 0)
    assert len({text for _, text in scale.ticks()}) == len(ticks)


def test_ticks_are_round() -> None:
    assert [t for _, t in Scale(0, 1).ticks()] == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert [t for _, t in Scale(0, 19_500).ticks()] == ["0", "5,000", "10,000", "15,000"]
    assert [t for _, t in Scale(0, 1e-3).ticks()] == ["0", "0.00025", "0.0005", "0.00075", "0.001"]
    assert [t for _, t in Scale(0.01, 1e4, log=True).ticks()] == ["0.01", "1", "100", "10000"]
    assert [t for _, t in Scale(0.5, 20, log=True).ticks()] == ["0.5", "1", "2", "5", "10", "20"]
