"""What the terminal shows while a run trains: a panel that is redrawn in place, or plain lines where it cannot be.

It costs the training next to nothing: a step only takes down its numbers, and a few times a second the panel is drawn.
"""

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from patchsight_train.trace import SmoothedLoss, Trace
from patchsight_train.wording import EVALUATED, duration, number, value

REDRAW_S = 0.5
LINE_S = 30.0  # between plain lines
SHOWN = ("lr", "images_per_s")  # beside the loss
HEADLINES = ("accuracy", "knn", "linear_probe", "rankme")  # of an evaluation


class Display:
    """The terminal's view of one run, from `start_step`, where it goes on, to `total_steps`.

    On a terminal it is a context manager around a live panel; elsewhere (a log file, CI, a pipe) plain ASCII lines are
    printed every 30 s, and for what must not be missed.
    """

    def __init__(
        self, console: Console, total_steps: int, epochs: int, steps_per_epoch: int, start_step: int = 0
    ) -> None:
        self.console, self.total_steps, self.epochs = console, total_steps, epochs
        self.steps_per_epoch, self.start_step, self.now = steps_per_epoch, start_step, start_step
        self.loss, self.trace = SmoothedLoss(), Trace()
        self.values: Mapping[str, float] = {}
        self.evaluation: tuple[float, Mapping[str, float]] | None = None
        self.warnings: list[str] = []
        self.skipped = 0
        self.started, self.drawn = time.monotonic(), -math.inf
        self.printed = start_step
        self.live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only:
            self.live = Live(console=console, get_renderable=self.panel, auto_refresh=False)

    def __enter__(self) -> Self:
        self.started = time.monotonic()
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.live:
            self.live.refresh()
            self.live.stop()
        elif self.now > self.printed:
            self._draw()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of the step that was just done; `step` counts from 1."""
        self.now, self.values = step, values
        self.skipped += "skipped" in values
        if math.isfinite(values.get("loss", math.nan)):
            self.loss.add(values["loss"])
            self.trace.add(self.loss.value)
        elapsed = time.monotonic() - self.drawn
        if elapsed >= (REDRAW_S if self.live else LINE_S):
            self._draw()

    def evaluated(self, epoch: float, values: Mapping[str, float]) -> None:
        """What an evaluation measured, a metric's name to its value; printed to stay."""
        self.evaluation = (epoch, values)
        found = ", ".join(
            f"{EVALUATED[name].label} {value(name, values[name])}" for name in HEADLINES if name in values
        )
        self._print(f"epoch {epoch:.4g}: loss {number(self.loss.value)}{', ' if found else ''}{found}")
        self._draw(line=False)

    def warn(self, text: str) -> None:
        """Something that the person must know; printed to stay, and kept in the panel."""
        self.warnings.append(text)
        self._print(f"warning: {text}", "bold yellow")
        self._draw(line=False)

    def note(self, text: str) -> None:
        """A line to stay, such as a checkpoint or a resumed run."""
        self._print(text)

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far, evaluations included; None before the first step of this process."""
        done = self.now - self.start_step
        return (time.monotonic() - self.started) / done * (self.total_steps - self.now) if done else None

    def line(self) -> str:
        """The state in one plain line."""
        parts = [
            f"epoch {self.now / self.steps_per_epoch:.1f}/{self.epochs}",
            f"step {self.now:,}/{self.total_steps:,}",
        ]
        parts += [text for _, text in self._figures()]
        parts += [f"{duration(self.seconds_left)} left"] if self.seconds_left else []
        return ", ".join(parts)

    def panel(self) -> RenderableType:
        """The state as a panel, as wide as the console, for a live display or a picture."""
        rows: list[RenderableType] = [self._progress(), self._numbers()]
        if self.evaluation:
            rows.append(self._evaluation())
        if self.warnings:
            rows.append(Text(f"⚠ {self.warnings[-1]}", style="bold yellow"))
        return Panel(Group(*rows), title="patchsight-train", title_align="left", border_style="dim", padding=(0, 1))

    def _figures(self) -> list[tuple[str, str]]:
        """`(name, "loss 2.996")` of what is known of the current step."""
        figures = [("loss", f"loss {number(self.loss.value)}")] if self.loss.count else []
        for name in SHOWN:
            if name in self.values:
                text = value(name, self.values[name])
                figures.append((name, text if name == "images_per_s" else f"{name} {text}"))
        if self.skipped:
            figures.append(("skipped", f"{self.skipped:,} skipped"))
        return figures

    def _progress(self) -> Table:
        epoch = min(math.ceil(self.now / self.steps_per_epoch), self.epochs)
        left = self.seconds_left
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        row.add_column(no_wrap=True, justify="right", style="cyan")
        row.add_row(
            Text.assemble("epoch ", (f"{epoch:,}", "bold"), f"/{self.epochs:,}"),
            ProgressBar(self.total_steps, self.now, complete_style="cyan", finished_style="green"),
            f"step {self.now:,}/{self.total_steps:,}",
            f"{duration(left)} left" if left else "" if left is None else "done",
        )
        return row

    def _numbers(self) -> Text:
        styles = {"loss": "bold", "skipped": "bold red"}
        text = Text()
        for name, figure in self._figures():
            text.append("   " if text else "").append(figure, styles.get(name, ""))
            if name == "loss":
                text.append("  ").append(self.trace.sparkline(), "magenta")
        return text or Text("the first step is on its way", style="dim")

    def _evaluation(self) -> Text:
        assert self.evaluation
        epoch, values = self.evaluation
        text = Text()
        for name in HEADLINES:
            if name in values:
                text.append(f"{EVALUATED[name].label} ", "dim").append(value(name, values[name]), "bold green").append(
                    "   "
                )
        return text.append(f"at epoch {epoch:.4g}", "dim")

    def _draw(self, line: bool = True) -> None:
        """The panel, or a plain line, now."""
        if self.live:
            self.live.refresh()
        elif line:
            self._print(self.line())
            self.printed = self.now
        self.drawn = time.monotonic()

    def _print(self, text: str, style: str = "") -> None:
        if self.console.options.ascii_only:  # a letter that the terminal lacks must not end the training
            text = text.encode("ascii", "replace").decode()
        self.console.print(Text(text, style), soft_wrap=True)
