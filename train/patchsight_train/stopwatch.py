"""How long a run has trained, over all its starts: `time.json` in the run folder, written beside each checkpoint."""

import json
import time
from pathlib import Path


class Stopwatch:
    """Counts from its making on, on top of what earlier starts have written down."""

    def __init__(self, run: Path) -> None:
        self.path = run / "time.json"
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.step: int = before.get("step", -1)
        self.wall_s: float = before.get("wall_s", 0.0)
        self.cpu_s: float = before.get("cpu_s", 0.0)
        self.started = time.monotonic(), time.process_time()

    def write(self, step: int) -> None:
        """The time until this step; that until a step which was written down before stays."""
        if step <= self.step:
            return
        wall, cpu = self.started
        self.step, self.started = step, (time.monotonic(), time.process_time())
        self.wall_s += self.started[0] - wall
        self.cpu_s += self.started[1] - cpu
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"step": step, "wall_s": self.wall_s, "cpu_s": self.cpu_s}))
        partial.replace(self.path)
