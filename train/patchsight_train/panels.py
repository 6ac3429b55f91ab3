"""Which charts a run's metrics make, in which order, with the lines that mean something in them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from patchsight_train.architecture import EncoderConfig, architecture
from patchsight_train.charts import Line, Mark, Reference, Span, line_chart, plane_chart
from patchsight_train.history import Curve, History
from patchsight_train.wording import measure, titled


@dataclass(frozen=True)
class Panel:
    """One chart. metrics: one line each, as far as they are logged. noisy: their mean is drawn over each step's."""

    title: str
    metrics: tuple[str, ...]
    note: str = ""
    noisy: bool = False
    may_be_log: bool = False


_FEATURES = (
    Panel("Classes from frozen features", ("knn", "linear_probe"), "Share of labelled pictures that are told rightly."),
    Panel("Effective rank", ("rankme",), "RankMe, arXiv:2210.02885: dimensions that the features really use."),
    Panel("Feature deviation", ("feature_std",), "Of each dimension, times √D: 0 is collapse, arXiv:2011.10566."),
)
_OBJECTIVE = (
    Panel("Entropy of the teacher", ("teacher_entropy", "teacher_mean_entropy"),
          "Healthy: low for an image, near ln K for their mean. Where the two meet, it has collapsed.", noisy=True),
    Panel("Entropy of the codes", ("code_entropy", "code_mean_entropy"),
          "Low for an image: its code is sure. ln K for their mean: all prototypes are used equally.", noisy=True),
    Panel("Contrastive accuracy", ("contrastive_accuracy",),
          "Views whose most similar other view is their own.", noisy=True),
    Panel("Accuracy", ("accuracy",), "Share of the images of --val that are classified rightly."),
    Panel("Accuracy in training", ("batch_accuracy",), "Share of the views of a batch; mixed ones by the larger part.",
          noisy=True),
    Panel("Agreement with the teacher", ("agreement",), "Pictures that both put into the same class.", noisy=True),
    Panel("Reconstruction", ("psnr",), "Peak signal-to-noise ratio of the pictures that come back.", noisy=True),
)  # fmt: skip
_OPTIMIZATION = (
    Panel("Learning rate", ("lr",)),
    Panel("Weight decay", ("weight_decay",)),
    Panel("Teacher momentum", ("teacher_momentum",)),
    Panel("Teacher temperature", ("teacher_temperature",)),
    Panel("Gradient norm", ("gradient_norm",), "Before it is clipped.", noisy=True, may_be_log=True),
    Panel("Speed", ("images_per_s",), noisy=True),
)
_ELSEWHERE = {"loss", "skipped", "alignment", "uniformity"}


def sections(history: History, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`(heading, charts as HTML)`; a section without charts is left out. `config`: a run's `config.toml`."""
    span = Span(history.step, history.steps_per_epoch)
    known = {name for panel in (*_FEATURES, *_OBJECTIVE, *_OPTIMIZATION) for name in panel.metrics} | _ELSEWHERE
    others = [Panel(titled(name), (name,), noisy=True) for name in history.curves if name not in known]
    lines = references(history, config)

    def charts(panels: tuple[Panel, ...] | list[Panel]) -> str:
        return "".join(_chart(panel, history, span, lines) for panel in panels)

    for heading, content in (
        ("Objective", _loss(history, span, config, lines) + charts([*_OBJECTIVE, *others])),
        ("Features", charts(_FEATURES) + _plane(history, span)),
        ("Optimization", charts(_OPTIMIZATION)),
    ):
        if content:
            yield heading, content


def references(history: History, config: Mapping[str, Any]) -> dict[str, list[Reference]]:
    """By metric: the values that mean something, computed from the settings."""
    found: dict[str, list[Reference]] = {
        "feature_std": [Reference(1.0, "1: all directions alike"), Reference(0.0, "0: collapse")]
    }
    encoder = encoder_of(config)
    if encoder:
        found["rankme"] = [Reference(float(encoder.width), f"D = {encoder.width}")]
    objective, K, B = config.get("objective"), config.get("prototypes"), config.get("batch_size")
    if objective in ("dino", "swav") and isinstance(K, int):
        uniform = [Reference(math.log(K), f"ln K = {math.log(K):.3f}: uniform")]
        found["loss"] = uniform
        found |= dict.fromkeys(("teacher_entropy", "code_entropy"), [*uniform, Reference(0.0, "0: one prototype")])
    # An epoch of a single step may be of fewer images than were asked for.
    if objective == "simclr" and isinstance(B, int) and history.steps_per_epoch != 1:
        chance = math.log(2 * B - 1)
        found["loss"] = [Reference(chance, f"ln(2B − 1) = {chance:.3f}: chance")]
        found["contrastive_accuracy"] = [Reference(100 / (2 * B - 1), "chance")]
    if objective == "mae" and config.get("normalize_pixels") and isinstance(config.get("patch_size"), int):
        n = 3 * config["patch_size"] ** 2  # the target's variance is 1 by the unbiased estimate
        found["loss"] = [Reference((n - 1) / n, f"{(n - 1) / n:.3f}: each patch's mean")]
    return found


def encoder_of(config: Mapping[str, Any]) -> EncoderConfig | None:
    """The encoder that the settings describe; None where they do not tell, or make no sense."""
    try:
        return architecture(dict(config))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _chart(panel: Panel, history: History, span: Span, references: Mapping[str, list[Reference]]) -> str:
    names = [name for name in panel.metrics if name in history.curves]
    lines: list[Line] = []
    for rank, name in enumerate(names):
        curve = history.curves[name].finite().scaled(measure(name).factor)
        lines += _noisy(curve, measure(name).label, rank) if panel.noisy else [Line(measure(name).label, curve, rank)]
    return line_chart(
        panel.title, _faint_first(lines), span,
        unit=measure(names[0]).unit if names else "", note=panel.note, may_be_log=panel.may_be_log,
        references=[reference for name in names[:1] for reference in references.get(name, [])],
    )  # fmt: skip


def _noisy(curve: Curve, label: str, rank: int) -> list[Line]:
    """Each step's value thin, their mean before it."""
    return [
        Line(f"{label}, this step" if label else "this step", curve, rank, faint=True),
        Line(label, curve.smooth(), rank),
    ]


def _faint_first(lines: list[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: not line.faint)


def _loss(history: History, span: Span, config: Mapping[str, Any], references: Mapping[str, list[Reference]]) -> str:
    if "loss" not in history.curves:
        return ""
    curve = history.curves["loss"].finite()
    note = "Thin: each step. Thick: mean over the last 1 % of the steps."
    marks = [Mark(step, text) for step, text in history.warnings]
    if marks:
        note += " Dotted: warnings."
    if "skipped" in history.curves:
        note += " Ticks at the bottom: steps that were skipped."
        marks += [Mark(step, "skipped, not finite", short=True) for step in history.curves["skipped"].thin(200).steps]
    return line_chart(
        "Loss", [Line("this step", curve, faint=True), Line("mean", curve.smooth())], span,
        unit=_LOSS_UNITS.get(str(config.get("objective")), ""), references=references.get("loss", ()), marks=marks,
        note=note, may_be_log=True, wide=True,
    )  # fmt: skip


_LOSS_UNITS = {
    "dino": "cross-entropy, nats", "swav": "cross-entropy, nats", "simclr": "cross-entropy, nats",
    "mae": "squared error of hidden patches", "autoencoder": "squared error", "skip_autoencoder": "squared error",
    "distillation": "1 − cosine", "soft_targets": "T² · KL divergence, nats",
    "finetune": "cross-entropy, nats",
}  # fmt: skip


def _plane(history: History, span: Span) -> str:
    x, y = (history.curves.get(name) for name in ("alignment", "uniformity"))
    if x is None or y is None:
        return ""
    return plane_chart(
        "Alignment and uniformity", x.finite(), y.finite(), "alignment", "uniformity", span,
        "arXiv:2005.10242. Less is better for both: towards the lower left.",
    )  # fmt: skip
