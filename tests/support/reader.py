"""Somebody who follows a page word by word: its commands, one after the other, in a clone of the project."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from pages import commands, scripts

READY_S = 60  # that `make serve` may take once its environment is there
PATIENCE_S = 240  # a first start tries engines; beside other work that takes its time
SERVER = re.compile(r"(\w+=\S+ )*patchsight-serve\b")
ELSEWHERE = {  # what a page says and this does not do again
    "make serve": "runs for all pages",
    "make test": "would run this",
    "make triton": "tests/triton starts one",
}


class Reader:
    """Each command has a shell of its own, in `folder`. Servers run until the page's end, or until another one takes
    their port, and have to leave with 0. `steps` tells what was done, and how many seconds it took."""

    def __init__(self, folder: Path, environment: dict[str, str], known: dict[str, float]) -> None:
        """known: seconds of commands that were run before, for `steps`."""
        self.steps: list[tuple[str, float]] = []
        self._folder, self._environment, self._known = folder, environment, known
        self._servers: dict[str, subprocess.Popen[bytes]] = {}  # by port

    def follow(self, page: Path) -> None:
        """Raises AssertionError, with what it said, where a command fails."""
        for name, text in scripts(page).items():
            (self._folder / name).write_text(text)
        try:
            for line in commands(page):
                began = time.monotonic()
                self._do(line)
                took = time.monotonic() - began
                self.steps.append((line, self._known.get(line, took)))
        finally:
            for port in list(self._servers):
                self._stop(port)

    def table(self) -> str:
        rows = [f"{seconds:8.1f} s  {line[:110]}" for line, seconds in self.steps]
        return "\n".join([*rows, f"{sum(seconds for _, seconds in self.steps):8.1f} s  in all"])

    def _do(self, line: str) -> None:
        if line in ELSEWHERE:
            return
        if SERVER.match(line):
            self._serve(line)
        elif line.startswith("export PATH="):
            told = subprocess.run(f'{line}; printf %s "$PATH"', shell=True, env=self._environment, cwd=self._folder,
                                  capture_output=True, text=True, check=True)  # fmt: skip
            self._environment = self._environment | {"PATH": told.stdout}
        else:
            honest = re.sub(r"\bcurl -s(\w*) ", r"curl -sS\1 --fail-with-body ", line)
            done = subprocess.run(honest, shell=True, cwd=self._folder, env=self._environment, capture_output=True,
                                  text=True)  # fmt: skip
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"

    def _serve(self, line: str) -> None:
        """On the port that it names, or beside `make serve`, with a state of its own; until it is ready."""
        if "--port" not in line:
            line = f"{line} --port 8001 --state-dir other"
        port = re.findall(r"--port (\d+)", line)[0]
        self._stop(port)
        log = self._folder / f"server-{port}.log"
        with log.open("wb") as file:
            self._servers[port] = subprocess.Popen(
                f"exec env {line}", shell=True, cwd=self._folder, env=self._environment, start_new_session=True,
                stdout=file, stderr=file,
            )  # fmt: skip
        try:
            wait_until_ready(self._servers[port], f"http://127.0.0.1:{port}")
        except AssertionError as error:
            raise AssertionError(f"{line}: {error}\n{log.read_text()}") from None

    def _stop(self, port: str) -> None:
        server = self._servers.pop(port, None)
        if server is not None:
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) == 0


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> float:
    """Seconds until /readyz said 200 for the first time."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE_S and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                return time.monotonic() - began
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.1)
    raise AssertionError(f"no 200 from {url}/readyz within {PATIENCE_S} s")


def clean_environment() -> dict[str, str]:
    """Without a setting of whoever runs the tests, and without the environment that they run in."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PATCHSIGHT_", "PYTHONPATH", "VIRTUAL_ENV"))}
    own = str(Path(sys.executable).parent)
    return kept | {"PATH": os.pathsep.join(p for p in kept["PATH"].split(os.pathsep) if p != own)}
