"""A server on a core of its own: core 0 is the server's, core 1 the clients'."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import load_generator
import process_tree

SERVER_CORE, CLIENT_CORE = 0, 1
START_S = 90.0


def pinned(command: Sequence[str]) -> list[str]:
    """The command line, for the server's core."""
    return ["taskset", "--cpu-list", str(SERVER_CORE), *command]


def stand_aside() -> None:
    """Move this process, which makes the load, to the clients' core."""
    os.sched_setaffinity(0, {CLIENT_CORE})


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], url: str, request: bytes, log: Path, expected: int = 200
) -> Iterator[tuple[int, bytes]]:
    """Start the server, and give its process and its answer to `request` once its status is
    `expected`; end it after the block.

    Raises RuntimeError with the log's end where it does not come to that.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(pinned(command), env=dict(environment), stdout=file, stderr=file, cwd=log.parent)
    try:
        yield process.pid, _first_answer(process, url, request, log, expected)
    finally:
        process_tree.end(process.pid)
        process.wait()


def _first_answer(process: "subprocess.Popen[bytes]", url: str, request: bytes, log: Path, expected: int) -> bytes:
    deadline = time.monotonic() + START_S
    told = "no connection"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            status, body = load_generator.run(load_generator.ask_once(url, request))
        except OSError:
            time.sleep(0.2)
            continue
        if status == expected:
            return body
        told = f"{status} {body[:200]!r}"
        time.sleep(0.2)
    raise RuntimeError(f"did not start: {told}; {log.read_text(errors='replace')[-600:]}")
