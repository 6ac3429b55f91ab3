"""The display on a terminal, whose output is replayed, and off it. Time is the tests' own."""

import io
import math
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from patchsight_train import display as display_module
from patchsight_train.display import Display

EVALUATION = {"knn": 0.58149, "linear_probe": 0.6123, "rankme": 41.25, "alignment": 0.5, "uniformity": -2.0}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(display_module, "time", clock)
    return clock


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, _environ={"TERM": "xterm"})


@pytest.fixture
def log() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(display: Display, clock: Clock, steps: range, seconds: float = 1.0, **values: float) -> None:
    for step in steps:
        clock.now += seconds
        display.step(step, {"loss": 3.0, "lr": 5e-4, "images_per_s": 812.4, **values})


def panel(display: Display) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(display.panel())
    return written(console)


def test_panel_shows_the_state(terminal: Console, clock: Clock) -> None:
    with Display(terminal, total_steps=400, epochs=10, steps_per_epoch=40) as display:
        assert "the first step is on its way" in panel(display)
        run(display, clock, range(1, 101))
        clock.now += 50  # evaluating counts as time
        display.evaluated(2.5, EVALUATION)
        shown = panel(display)
    assert "epoch 3/10" in shown
    assert "step 100/400" in shown
    assert "8 min left" in shown  # 300 steps at 1.5 s
    assert "loss 3.000" in shown
    assert "lr 5.00e-04   812 images/s" in shown
    assert "20-NN 58.1 %   linear probe 61.2 %   RankMe 41.25   at epoch 2.5" in shown
    assert "skipped" not in shown


def test_skipped_steps_are_counted_and_leave_the_loss(terminal: Console, clock: Clock) -> None:
    with Display(terminal, 400, 10, 40) as display:
        run(display, clock, range(1, 11))
        run(display, clock, range(11, 13), loss=math.nan, skipped=1.0)
        run(display, clock, range(13, 14), loss=math.inf, skipped=1.0)
        shown = panel(display)
    assert "loss 3.000" in shown
    assert "3 skipped" in shown


def test_a_resumed_run_is_timed_from_where_it_went_on(terminal: Console, clock: Clock) -> None:
    with Display(terminal, 400, 10, 40, start_step=300) as display:
        assert "step 300/400" in panel(display)
        assert display.seconds_left is None
        run(display, clock, range(301, 311), seconds=2.0)
        assert display.seconds_left == pytest.approx(180)
        run(display, clock, range(311, 401), seconds=2.0)
        assert display.seconds_left == 0
        assert "done" in panel(display)


def test_the_panel_is_redrawn_twice_a_second_at_most(terminal: Console, clock: Clock) -> None:
    with Display(terminal, 40_000, 10, 4000) as display:
        drawn = []
        refresh = display.live.refresh  # type: ignore[union-attr]
        display.live.refresh = lambda: drawn.append(clock.now) or refresh()  # type: ignore
        run(display, clock, range(1, 2001), seconds=0.005)
    assert 19 <= len(drawn) <= 22  # 10 s, the first step and the end


def replay(output: str) -> list[str]:
    """The lines that a terminal shows in the end: cursor up, erase line and carriage return are what a panel needs."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\n|\r|[^\x1b\n\r]+", output):
        if piece == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\r":
            column = 0
        elif piece == "\x1b[1A":
            row -= 1
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif not piece.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in lines]


def test_what_must_stay_stays_above_one_panel(terminal: Console, clock: Clock) -> None:
    with Display(terminal, 400, 10, 40) as display:
        display.note("resuming at [bold]step[/bold] 0")
        run(display, clock, range(1, 41))
        display.evaluated(1, EVALUATION)
        display.warn("rank 1.2 of 192: raise --lr")
        run(display, clock, range(41, 81))
        display.evaluated(2, EVALUATION)
    lines = replay(written(terminal))
    assert lines[:4] == [
        "resuming at [bold]step[/bold] 0",
        "epoch 1: loss 3.000, 20-NN 58.1 %, linear probe 61.2 %, RankMe 41.25",
        "warning: rank 1.2 of 192: raise --lr",
        "epoch 2: loss 3.000, 20-NN 58.1 %, linear probe 61.2 %, RankMe 41.25",
    ]
    panel = "\n".join(lines[4:])
    assert panel.count("patchsight-train") == 1
    assert "step 80/400" in panel
    assert "⚠ rank 1.2 of 192: raise --lr" in panel


def test_plain_lines_where_there_is_no_terminal(log: Console, clock: Clock) -> None:
    with Display(log, 400, 10, 40) as display:
        run(display, clock, range(1, 71))
        display.evaluated(1.75, EVALUATION)
        display.warn("rank 1.2 of 192: raise --lr")
        run(display, clock, range(71, 73), skipped=1.0)
    assert written(log).splitlines() == [
        "epoch 0.0/10, step 1/400, loss 3.000, lr 5.00e-04, 812 images/s, 7 min left",
        "epoch 0.8/10, step 31/400, loss 3.000, lr 5.00e-04, 812 images/s, 6 min left",
        "epoch 1.5/10, step 61/400, loss 3.000, lr 5.00e-04, 812 images/s, 6 min left",
        "epoch 1.75: loss 3.000, 20-NN 58.1 %, linear probe 61.2 %, RankMe 41.25",
        "warning: rank 1.2 of 192: raise --lr",
        "epoch 1.8/10, step 72/400, loss 3.000, lr 5.00e-04, 812 images/s, 2 skipped, 5 min left",
    ]


def test_an_evaluation_without_labels_is_told_too(log: Console, clock: Clock) -> None:
    with Display(log, 40, 1, 40) as display:
        run(display, clock, range(1, 2))
        display.evaluated(1, {"rankme": 41.25})
    assert written(log).splitlines()[1:] == ["epoch 1: loss 3.000, RankMe 41.25"]


def test_the_last_line_is_not_said_twice(log: Console, clock: Clock) -> None:
    with Display(log, 1, 1, 1) as display:
        run(display, clock, range(1, 2))
    assert len(written(log).splitlines()) == 1


def test_an_error_leaves_the_terminal_in_order(terminal: Console, clock: Clock) -> None:
    display = Display(terminal, 400, 10, 40)

    def fail() -> None:
        with display:
            run(display, clock, range(1, 4))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert written(terminal).endswith("\x1b[?25h")  # the cursor is back
    assert "step 3/400" in "\n".join(replay(written(terminal)))


@pytest.mark.parametrize("make", ["ascii", "dumb"])
def test_terminals_that_cannot_do_it_get_ascii_lines(make: str, clock: Clock) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii" if make == "ascii" else "utf-8", write_through=True)
    environ = {"TERM": "xterm" if make == "ascii" else "dumb"}
    console = Console(file=file, force_terminal=True, color_system=None, _environ=environ)
    with Display(console, 40, 1, 40) as display:
        run(display, clock, range(1, 3))
        display.warn("τ is too high")
    text = raw.getvalue().decode()
    assert "\x1b" not in text
    assert text.splitlines()[1] == ("warning: ? is too high" if make == "ascii" else "warning: τ is too high")


def test_drawing_survives_any_values(terminal: Console, log: Console, clock: Clock) -> None:
    check: Callable[[Display], object]
    for console, check in ((terminal, panel), (log, Display.line)):
        with Display(console, 1, 1, 1, start_step=1) as display:
            check(display)
        with Display(console, 10, 1, 10) as display:
            display.evaluated(0, {})
            run(display, clock, range(1, 3), seconds=31, loss=math.nan, lr=0.0, images_per_s=math.inf)
            display.evaluated(0.2, {"knn": math.nan})
            run(display, clock, range(3, 4), seconds=31, loss=-1e30)
            check(display)
            display.step(4, {})
            check(display)
