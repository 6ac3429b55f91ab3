"""Two kinds of charts beside those over steps: over a few named places, and points in a plane.

Inline SVG in the frame and the axes of `charts`, for the same style sheet. Knows nothing of what is shown.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from patchsight_train.charts import Line, Scale, draw_axes, figure_of, fit, path_of, short_number, stretched, svg_of
from patchsight_train.history import Curve

COLORS = 3  # of the theme


@dataclass(frozen=True)
class Places(Scale):
    """An axis of named places, evenly spaced."""

    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Sequence[str]) -> "Places":
        return cls(0.0, max(len(names) - 1, 1), names=tuple(names))

    def ticks(self) -> list[tuple[float, str]]:
        return [(float(i), escape(name)) for i, name in enumerate(self.names)]


@dataclass(frozen=True)
class Cloud:
    """Points float64 `(n,)` of one color, joined in their order by a thin line. rank: which of the theme's colors, and
    from 3 on the same ones again, but pale. hints: what each point is."""

    label: str
    rank: int
    x: np.ndarray
    y: np.ndarray
    hints: Sequence[str]


def ordered_chart(
    title: str, names: Sequence[str], lines: Mapping[str, Sequence[float]], x_name: str, unit: str, top: float
) -> str:
    """Lines over named places, from 0 to `top`, as one `<figure>`; what is not finite is left out."""
    x_scale, y_scale = Places.of(names), Scale(0.0, top)
    drawn, dots, kept = [], [], []
    for rank, (label, values) in enumerate(lines.items()):
        at = np.array([i for i, value in enumerate(values) if math.isfinite(value)], float)
        heights = np.array([value for value in values if math.isfinite(value)], float)
        if not len(at):
            continue
        kept.append(Line(label, Curve(at, heights), rank))
        x, y = x_scale.place(at), y_scale.place(heights)
        drawn.append(f'<path class="curve c{rank}" data-name="{escape(label)}" d="{path_of(x, y)}"/>')
        dots += [
            _dot(a, b, rank, f"{names[int(i)]}: {label} {short_number(value)} {unit}")
            for a, b, i, value in zip(x, y, at, heights, strict=True)
        ]
    if not kept:
        return ""
    spoken = "; ".join(
        f"{x.label} from {short_number(x.curve.values[0])} to {short_number(x.curve.values[-1])} {unit}" for x in kept
    )
    now = " · ".join(f"{line.curve.values[-1]:.1f}" for line in kept) + f" {unit}"
    inner = [draw_axes(x_scale, y_scale, x_name, unit), stretched(drawn), *dots]
    return figure_of(title, now, kept, "", svg_of(spoken, inner), "", wide=False)


def scatter_chart(title: str, clouds: Sequence[Cloud], x_name: str, y_name: str, now: str = "", note: str = "") -> str:
    """Points of several groups in a plane; all values are finite. Nothing is drawn without a point."""
    clouds = [cloud for cloud in clouds if len(cloud.x)]
    if not clouds:
        return ""
    x_scale, y_scale = (fit(np.concatenate([getattr(cloud, axis) for cloud in clouds])) for axis in "xy")
    paths, dots = [], []
    for cloud in clouds:
        rank, pale = cloud.rank % COLORS, cloud.rank >= COLORS
        x, y = x_scale.place(cloud.x), y_scale.place(cloud.y)
        paths.append(f'<path class="curve c{rank} faint" data-name="{escape(cloud.label)}" d="{path_of(x, y)}"/>')
        dots += [_dot(a, b, rank, hint, pale) for a, b, hint in zip(x, y, cloud.hints, strict=True)]
    legend = [Line(cloud.label, Curve(cloud.x, cloud.y), cloud.rank % COLORS) for cloud in clouds]
    spoken = f"{sum(len(cloud.x) for cloud in clouds)} points of {x_name} and {y_name}"
    inner = [draw_axes(x_scale, y_scale, x_name, y_name), stretched(paths), *dots]
    return figure_of(title, now, legend if len(clouds) > 1 else [], note, svg_of(spoken, inner), "", wide=False)


def _dot(x: float, y: float, rank: int, hint: str, pale: bool = False) -> str:
    kind = f"c{rank}{' past' if pale else ''}"
    return f'<circle class="{kind}" cx="{x:.3%}" cy="{1 - y:.3%}" r="3"><title>{escape(hint)}</title></circle>'
