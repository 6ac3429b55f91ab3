"""A real Triton server that may be harmed: what tests/triton and triton_gateway.py start."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from measure import ROOT

# Read when this is imported: tests run without the person's variables.
ENVIRONMENT = Path(os.environ.get("PATCHSIGHT_TEST_TRITON", ROOT / ".triton-venv"))
PATIENCE_S = 60


class TritonProcess:
    """One Triton on ports of its own; it may be killed and started again."""

    def __init__(self, models: Path, log: Path) -> None:
        self.models, self.log = models, log
        self.ports = [free_port() for _ in range(3)]
        self.address = f"grpc://127.0.0.1:{self.ports[1]}"
        self.harmed = False
        self._launcher: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it is ready."""
        flags = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), self.ports, strict=True)]
        line = [sys.executable, "-m", "patchsight_serve.triton_server", str(ENVIRONMENT), str(self.models), *flags]
        with self.log.open("ab") as file:
            self._launcher = subprocess.Popen(line, stdout=file, stderr=file)
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self._launcher.poll() is None:
            if "Started Metrics Service" in self.log.read_text().rpartition("Triton on grpc://")[2]:
                return
            time.sleep(0.1)
        raise AssertionError(f"Triton did not start:\n{self.log.read_text()}")

    def stop(self) -> int:
        """As a person would; its exit status."""
        assert self._launcher is not None
        self._launcher.send_signal(signal.SIGTERM)
        return self._launcher.wait(timeout=40)

    def kill(self) -> None:
        """Without a chance to say anything."""
        assert self._launcher is not None
        self.harmed = True
        for server in children(self._launcher.pid):  # one, or none if it has ended
            for pid in (server, *children(server)):  # its workers would go on for a while
                os.kill(pid, signal.SIGKILL)
        self._launcher.wait(timeout=40)

    def kill_worker(self, encoder: str) -> None:
        """The process that runs a model's Python."""
        assert self._launcher is not None
        self.harmed = True
        (server,) = children(self._launcher.pid)
        (worker,) = [pid for pid in children(server) if f"/{encoder}/" in _command(pid)]
        os.kill(worker, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # gone in the meantime
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def free_port() -> int:
    """Of this machine, at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
