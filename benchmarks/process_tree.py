"""What a process and all that it has started cost: CPU time and memory, from /proc."""

import contextlib
import os
import signal
import time
from pathlib import Path
from threading import Event, Thread
from typing import Self

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """`pid` and every process below it that still runs."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone in the meantime
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
    found = [pid]
    for known in found:  # grows while it is read
        found += [child for child, parent in parents.items() if parent == known]
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of the tree, with that of children that have ended and were waited for."""
    ticks = 0
    for each in descendants(pid):
        with contextlib.suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks * TICK_S


def memory_mb(pid: int) -> float:
    """Resident memory of the tree, MB; pages that processes share are counted once."""
    kilobytes = 0
    for each in descendants(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kilobytes += int(line.split()[1])
    return kilobytes / 1024


class MemoryPeak:
    """Looks at the tree's memory twice a second, in a thread, while the block runs. mb: the most that was seen."""

    def __init__(self, pid: int) -> None:
        self.mb = 0.0
        self._pid, self._over = pid, Event()
        self._thread = Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            self.mb = max(self.mb, memory_mb(self._pid))
            if self._over.wait(0.5):
                return


def end(pid: int, patience_s: float = 8.0) -> None:
    """TERM to the process, and after `patience_s` KILL to whatever of its tree is left."""
    tree = descendants(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and any(map(_runs, tree)):
        time.sleep(0.1)
    for each in filter(_runs, tree):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
