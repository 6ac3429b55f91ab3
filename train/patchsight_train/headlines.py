"""What a report says first: warnings, and the numbers that tell at a glance how a run is. As HTML."""

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from patchsight_train.history import Curve, History
from patchsight_train.panels import encoder_of
from patchsight_train.wording import number, titled, value

SHOWN_WARNINGS = 5


def warnings(history: History) -> str:
    """Each text once, with the time it first came and how often; the newest ones."""
    times: dict[str, list[int]] = {}
    for step, text in history.warnings:
        times.setdefault(text, []).append(step)
    if not times:
        return ""
    newest = sorted(times.items(), key=lambda item: item[1][-1])[-SHOWN_WARNINGS:]
    items = "".join(
        f"<li><p>{_flags_marked(text)}</p><p class='when'>{_when(steps, history)}</p></li>" for text, steps in newest
    )
    hidden = len(times) - len(newest)
    more = f"<p class='when'>and {hidden} earlier ones in metrics.jsonl</p>" if hidden else ""
    return f'<section class="warnings"><h2>This run shows signs of collapse</h2><ul>{items}</ul>{more}</section>\n'


def _flags_marked(text: str) -> str:
    """Remedies name flags of the command line: they stand out, and are not broken at their hyphens."""
    return re.sub(r"--[\w-]+", r"<code>\g<0></code>", escape(text))


def _when(steps: list[int], history: History) -> str:
    def at(step: int) -> str:
        per_epoch = history.steps_per_epoch
        return f"epoch {step / per_epoch:.3g} (step {step:,})" if per_epoch else f"step {step:,}"

    return f"at {at(steps[0])}" if len(steps) == 1 else f"{len(steps)} times, from {at(steps[0])} to {at(steps[-1])}"


def tiles(history: History, config: Mapping[str, Any]) -> str:
    """The newest value of what matters most, as far as it is logged, and how many steps were skipped."""
    found = ""
    loss = _finite(history, "loss")
    if loss:
        found += _tile("Loss", number(loss.smooth().values[-1]), f"from {number(loss.values[0])}")
    for name in ("knn", "linear_probe"):
        curve = _finite(history, name)
        if curve:
            found += _tile(titled(name), value(name, curve.values[-1]), _best(curve, name, history))
    rank = _finite(history, "rankme")
    if rank:
        encoder = encoder_of(config)
        below = f"of {encoder.width} dimensions" if encoder else "dimensions"
        found += _tile(titled("rankme"), number(rank.values[-1], 3), below)
    if history.step:
        skipped = len(history.curves["skipped"].steps) if "skipped" in history.curves else 0
        found += _tile("Skipped steps", f"{skipped:,}", "not finite" if skipped else "all were finite", bad=skipped > 0)
    return f'<dl class="tiles">{found}</dl>\n' if found else ""


def _tile(label: str, text: str, below: str, bad: bool = False) -> str:
    kind = ' class="bad"' if bad else ""
    return f"<div{kind}><dt>{escape(label)}</dt><dd>{escape(text)}<small>{escape(below)}</small></dd></div>"


def _finite(history: History, name: str) -> Curve | None:
    curve = history.curves[name].finite() if name in history.curves else None
    return curve if curve and len(curve.steps) else None


def _best(curve: Curve, name: str, history: History) -> str:
    best = int(curve.values.argmax())
    if best == len(curve.values) - 1:
        return "the best so far" if best else "first evaluation"
    per_epoch = history.steps_per_epoch
    when = f"epoch {curve.steps[best] / per_epoch:.3g}" if per_epoch else f"step {curve.steps[best]:,.0f}"
    return f"best {value(name, curve.values[best])}, {when}"
