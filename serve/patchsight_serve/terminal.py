"""What a command shows on the terminal while it works."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class RateColumn(ProgressColumn):
    """Images a second, of the last half minute; of all once they are done."""

    def render(self, task: Task) -> Text:
        """Empty until something is done."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} images/s", style="progress.data.speed")


def progress_bar() -> Progress:
    """On stderr, so that stdout holds the result alone. All tasks are of images."""
    name = TextColumn("{task.description}")
    columns = (name, BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
