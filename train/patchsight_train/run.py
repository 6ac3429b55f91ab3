"""The run folder: `config.toml` (all that is needed to repeat the run), `metrics.jsonl`, `checkpoints/`.

Export reads it; nothing in it needs torch but the checkpoints.
"""

import json
import math
import os
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from patchsight_serve.errors import InvalidRequest
from patchsight_train.settings import TrainSettings

# May differ between the first start and a later one: they do not change the numbers.
_FREE = {
    "run", "checkpoint_every", "threads", "data", "knn_test", "test", "val", "device", "micro_batch", "recompute",
    "compile", "resident", "tensorboard", "on_collapse", "init", "teacher", "teacher_labels",
}  # fmt: skip


def config_of(settings: TrainSettings) -> dict[str, Any]:
    """The settings as plain values, with the objective and what ran them."""
    values = settings.model_dump(mode="json", exclude={"config", "run"}, exclude_none=True)
    return {
        "objective": settings.objective,
        **values,
        "commit": commit(),
        "patchsight": version("patchsight"),
        "torch": version("torch"),
    }


def open_run(run: Path, config: dict[str, Any]) -> None:
    """Create the folder and write `config.toml`, or check that the one there is of the same run.

    Raises:
        InvalidRequest: the folder holds a run with other settings; the first differences are named.
    """
    path = run / "config.toml"
    if not path.exists():
        run.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(
            "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in config.items())
        )
        partial.replace(path)
        return
    before = read_config(run)
    fixed = (before.keys() | config.keys()) - _FREE - {"commit", "patchsight", "torch"}
    changed = sorted((k for k in fixed if before.get(k) != config.get(k)), key=lambda k: (k != "objective", k))
    if changed:
        shown = ", ".join(f"{k} was {before.get(k)!r}, is now {config.get(k)!r}" for k in changed[:3])
        raise InvalidRequest(f"{run} holds another run ({shown}); choose another --run, or delete that folder")


def read_config(run: Path) -> dict[str, Any]:
    """`config.toml` of a run. Raises InvalidRequest where there is none, or it cannot be read."""
    path = run / "config.toml"
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise InvalidRequest(f"{run}: not a run folder, config.toml is missing") from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"{path}: {error}") from None


class Metrics:
    """`metrics.jsonl`: one JSON object a line, in the order of steps."""

    def __init__(self, run: Path, step: int) -> None:
        """Open for appending; lines beyond `step` are of updates that a kill undid, and are cut."""
        self.path = run / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(self.path)
        self.file = self.path.open("a", buffering=1)  # a line at a time, so that it can be followed

    def lines(self) -> list[dict[str, Any]]:
        """What has been written so far, in the order of steps."""
        rows = (json.loads(line) for line in self._lines())
        return [{name: math.nan if x is None else x for name, x in row.items()} for row in rows]

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        # A kill may leave half a line at the end.
        return [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def write(self, step: int, **values: float | str) -> None:
        """What is not finite, as the loss of a skipped step, becomes null, and NaN when read: JSON has neither."""
        row = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
        self.file.write(json.dumps({"step": step, **row}) + "\n")

    def sync(self) -> None:
        """On disk before the checkpoint that counts on it."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def commit() -> str:
    """Commit of the source tree, with `+changes` where it differs; "unknown" for an installed wheel."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # a wheel may be installed inside of another's tree
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
