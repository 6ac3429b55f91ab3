"""Line charts as inline SVG. Text keeps its size at any width, colors follow the page's theme, nothing is fetched.

A chart's box is its plot area; labels hang over its edges into the margin that `report.css` leaves. Curves lie in an
inner SVG whose 1000 × 1000 units stretch with the box, all else is placed by percentages. Knows nothing of training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from patchsight_train.history import Curve
from patchsight_train.wording import number

FEW = 40  # points that are shown as dots too
SMOOTHED_POINTS = 500
TINY = 1e-12  # what differs by less is drawn as equal


@dataclass(frozen=True)
class Line:
    """A curve of a chart; all values are finite. rank: which of the theme's colors. faint: behind the others, thin."""

    label: str
    curve: Curve
    rank: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Reference:
    """A value that means something, as a horizontal line."""

    value: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A step at which something happened. short: at the bottom only."""

    step: float
    label: str
    short: bool = False


@dataclass(frozen=True)
class Span:
    """The steps that all charts of a run cover: from 0 to `last`, in epochs where their length is known."""

    last: int
    steps_per_epoch: int | None

    @property
    def scale(self) -> "Scale":
        return Scale(0.0, max(self.last, 1) / (self.steps_per_epoch or 1))

    def place(self, steps: np.ndarray) -> np.ndarray:
        return steps / max(self.last, 1)


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`; logarithmic ones are positive."""

    low: float
    high: float
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """0 at `low`, 1 at `high`."""
        if self.log:
            return Scale(math.log(self.low), math.log(self.high)).place(np.log(values))
        share: np.ndarray = (values - self.low) / (self.high - self.low)
        return share

    def ticks(self) -> list[tuple[float, str]]:
        """Three to six round values with their text."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def fit(values: np.ndarray, may_be_log: bool = False) -> Scale:
    """An axis for finite values, with a little air; logarithmic where it may be and they span more than 30 : 1."""
    low, high = float(values.min()), float(values.max())
    if may_be_log and low > TINY and high / low > 30:
        air = (high / low) ** 0.04
        return Scale(low / air, high * air, log=True)
    spread = high - low
    if spread <= max(1e-9 * max(abs(low), abs(high)), TINY):  # a constant: nothing to see but its height
        spread = max(abs(high), TINY)
    air = 0.06 * spread
    return Scale(0.0 if 0 <= low < spread * 0.25 else low - air, high + air)


def _linear_ticks(low: float, high: float) -> list[tuple[float, str]]:
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 2.5, 5, 10), key=lambda m: abs(math.log(m * power / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    most = max(abs(first), abs(last)) * step
    if most >= 1e6 or most < 1e-2:
        return [(i * step, f"{i * step:.4g}".replace("e-0", "e-").replace("e+0", "e")) for i in range(first, last + 1)]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9) + (step / power == 2.5))
    return [(i * step, f"{i * step:,.{decimals}f}") for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 2:  # one or two powers of ten alone would say little
        values = [m * 10.0**i for i in range(first - 1, last + 1) for m in (1, 2, 5)]
        values = [v for v in values if low <= v <= high]
    else:
        values = [10.0**i for i in range(first, last + 1, -(-(last - first + 1) // 6))]
    return [(v, f"{v:g}".replace("e-0", "e-").replace("e+0", "e")) for v in values]


def line_chart(
    title: str, lines: Sequence[Line], span: Span, *, unit: str = "", references: Sequence[Reference] = (),
    marks: Sequence[Mark] = (), note: str = "", may_be_log: bool = False, wide: bool = False,
) -> str:  # fmt: skip
    """Lines over the steps of a run, as one `<figure>`; nothing where no line has a point."""
    lines = [line for line in lines if len(line.curve.steps)]
    if not lines:
        return ""
    heights = [np.array([r.value for r in references]), *(line.curve.values for line in lines)]
    scale = fit(np.concatenate(heights), may_be_log)
    drawn, dots = [], []
    for line in lines:
        curve = line.curve.thin() if line.faint or len(line.curve.steps) <= FEW else line.curve.thin(SMOOTHED_POINTS)
        x, y = span.place(curve.steps), scale.place(curve.values)
        kind = f"curve c{line.rank}{' faint' if line.faint else ''}"
        drawn.append(f'<path class="{kind}" data-name="{escape(line.label)}" d="{path_of(x, y)}"/>')
        if len(x) <= FEW and not line.faint:
            at = zip(x, 1 - y, strict=True)
            dots += [f'<circle class="c{line.rank}" cx="{a:.3%}" cy="{b:.3%}" r="2.5"/>' for a, b in at]
    inner = [draw_axes(span.scale, scale, "epoch" if span.steps_per_epoch else "step", unit)]
    inner += [*(_mark(mark, span) for mark in marks), stretched(drawn), *dots]
    inner += [_reference(reference, scale, lines, span) for reference in references]
    solid = [line for line in lines if not line.faint]
    now = " · ".join(short_number(line.curve.values[-1]) for line in solid) + (" %" if unit == "%" else "")
    spoken = "; ".join(
        f"{line.label} from {short_number(line.curve.values[0])} to {short_number(line.curve.values[-1])}"
        for line in solid
    )
    data = f'data-x="{span.last} {span.steps_per_epoch or 0}" data-y="{scale.low!r} {scale.high!r} {int(scale.log)}"'
    return figure_of(title, now, solid if len(solid) > 1 else [], note, svg_of(spoken, inner), data, wide)


def plane_chart(title: str, x: Curve, y: Curve, x_name: str, y_name: str, span: Span, note: str = "") -> str:
    """The path of two measures against each other, taken at the same steps; each point tells its epoch."""
    steps, i, j = np.intersect1d(x.steps, y.steps, return_indices=True)
    if not len(steps):
        return ""
    x_scale, y_scale = fit(x.values[i]), fit(y.values[j])
    across, up = x_scale.place(x.values[i]), y_scale.place(y.values[j])
    inner = [draw_axes(x_scale, y_scale, x_name, y_name)]
    inner.append(stretched([f'<path class="curve c0 faint" d="{path_of(across, up)}"/>']))
    shown = np.unique(np.linspace(0, len(steps) - 1, 200, dtype=int))
    for k in shown:
        when = _when(steps[k], span)
        text = f"{when}: {x_name} {short_number(x.values[i][k])}, {y_name} {short_number(y.values[j][k])}"
        newest = k == shown[-1]
        inner.append(
            f'<circle class="c0{"" if newest else " past"}" cx="{across[k]:.3%}" cy="{1 - up[k]:.3%}" '
            f'r="{5 if newest else 3}"><title>{text}</title></circle>'
        )
    ends = [
        (name, short_number(v[0]), short_number(v[-1])) for name, v in ((x_name, x.values[i]), (y_name, y.values[j]))
    ]
    now = " · ".join(last for _, _, last in ends)
    spoken = "; ".join(f"{name} from {first} to {last}" for name, first, last in ends)
    return figure_of(title, now, [], note, svg_of(spoken, inner), "", wide=False)


def short_number(x: float) -> str:
    """Four significant digits, without zeros at the end."""
    text = number(x)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _when(step: float, span: Span) -> str:
    return f"epoch {step / span.steps_per_epoch:.4g}" if span.steps_per_epoch else f"step {step:,.0f}"


def path_of(x: np.ndarray, y: np.ndarray) -> str:
    """0..1 each, y upwards, as an SVG path in the inner units."""
    points = (f"{a:.2f} {b:.2f}" for a, b in zip((x * 1000).tolist(), ((1 - y) * 1000).tolist(), strict=True))
    return "M" + "L".join(points)


def svg_of(spoken: str, inner: Sequence[str]) -> str:
    return f'<svg role="img" aria-label="{escape(spoken)}">{"".join(inner)}</svg>'


def stretched(paths: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{"".join(paths)}</svg>'


def draw_axes(x: Scale, y: Scale, x_name: str, y_name: str) -> str:
    parts = []
    for value, text in y.ticks():
        at = f"{1 - float(y.place(np.array(value))):.3%}"
        parts.append(f'<line class="grid" x2="100%" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="0" dx="-8" y="{at}" dy="0.32em" text-anchor="end">{text}</text>')
    for value, text in x.ticks():
        place = float(x.place(np.array(value)))
        anchor = "end" if place > 0.97 else "middle"
        parts.append(f'<text class="tick" x="{place:.3%}" y="100%" dy="1.5em" text-anchor="{anchor}">{text}</text>')
    parts.append('<line class="axis" x2="100%" y1="100%" y2="100%"/>')
    parts.append(f'<text class="name" x="100%" y="100%" dy="2.9em" text-anchor="end">{escape(x_name)}</text>')
    parts.append(f'<text class="name" x="0" dx="-8" y="0" dy="-0.9em">{escape(y_name)}</text>')
    return "".join(parts)


def _reference(reference: Reference, scale: Scale, lines: Sequence[Line], span: Span) -> str:
    place = float(scale.place(np.array(reference.value)))
    at = f"{1 - place:.3%}"
    free = [_distance(place, lines, scale, span, *side) for side in ((0.0, 0.4), (0.6, 1.0))]
    where = 'x="4" text-anchor="start"' if free[0] > free[1] else 'x="100%" text-anchor="end"'
    return (
        f'<g class="reference" data-value="{reference.value!r}"><line x2="100%" y1="{at}" y2="{at}"/>'
        f'<text {where} y="{at}" dy="-0.4em">{escape(reference.label)}</text></g>'
    )


def _distance(place: float, lines: Sequence[Line], scale: Scale, span: Span, left: float, right: float) -> float:
    """How far all lines stay from this height between two places of the x axis; 1 where there are none."""
    distances = [1.0]
    for line in lines:
        x = span.place(line.curve.steps)
        inside = line.curve.values[(x >= left) & (x <= right)]
        if len(inside):
            distances.append(float(np.abs(scale.place(inside) - place).min()))
    return min(distances)


def _mark(mark: Mark, span: Span) -> str:
    at = f"{float(span.place(np.array(mark.step))):.3%}"
    top = "92%" if mark.short else "0"
    title = escape(f"{_when(mark.step, span)}: {mark.label}")
    return f'<line class="mark" x1="{at}" x2="{at}" y1="{top}" y2="100%"><title>{title}</title></line>'


def figure_of(title: str, now: str, lines: Sequence[Line], note: str, svg: str, data: str, wide: bool) -> str:
    legend = "".join(f'<li class="c{line.rank}">{escape(line.label)}</li>' for line in lines)
    below = f"<p>{escape(note)}</p>".replace(" %", "\u00a0%") if note else ""
    return (
        f'<figure class="chart{" wide" if wide else ""}"><figcaption><h3>{escape(title)}</h3><output>{now}</output>'
        f"{f'<ul>{legend}</ul>' if legend else ''}</figcaption>"
        f'<div class="plot" {data}>{svg}</div>{below}</figure>\n'
    )
