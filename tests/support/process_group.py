"""Several gateway processes on one port, started as a person would, and what they say."""

import re
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 120


class Group:
    """A running supervisor. Its output is in the file `log`."""

    def __init__(self, *flags: str) -> None:
        self.log = Path("log").resolve()
        line = [sys.executable, "-m", "patchsight_serve", "--port", "0", "--processes", "2", "--drain-delay-s", "0"]
        line += flags
        with self.log.open("w") as file:
            self.process = subprocess.Popen(line, stdout=file, stderr=file, text=True)

    def said(self, pattern: str, times: int = 1) -> list[str]:
        """What the log says, as soon as it says it so many times."""
        for _ in range(PATIENCE_S * 20):
            found = re.findall(pattern, self.log.read_text())
            if len(found) >= times:
                return found
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def ready(self) -> str:
        return self.said(r"2 processes running on (http://\S+)")[0]

    def pids(self) -> list[int]:
        return [int(pid) for pid in self.said(r"process (\d+) answers", 2)]
