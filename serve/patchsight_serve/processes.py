"""Several server processes that listen on one port: started, replaced when they die, told to reload and to leave."""

import logging
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from patchsight_serve.child import child_main
from patchsight_serve.errors import PatchsightError
from patchsight_serve.settings import ServeSettings
from patchsight_serve.shared_metrics import retire

logger = logging.getLogger(__name__)

SPAWN = multiprocessing.get_context("spawn")
FORWARDED = (signal.SIGTERM, signal.SIGINT)
RELOAD = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # Windows has none
STABLE_S = 30.0  # a process that answered for so long is replaced at once, one that did not later and later
LONGEST_PAUSE_S = 30.0
LEAST_SILENCE_S = 20.0
GRACE_S = 10.0  # beyond what a process may take to leave, before it is killed


def supervise(settings: ServeSettings) -> None:
    """Serve by `settings.processes` processes until told to stop. Galleries are not served.

    Raises PatchsightError if the port is taken, SystemExit(1) if a process could not start, or did not leave well.
    """
    sockets = bind(settings.host, settings.port)
    with TemporaryDirectory(prefix="patchsight-") as folder:
        clean = Supervisor(shares(settings), sockets, Path(folder)).run()
    if not clean:
        raise SystemExit(1)


def shares(settings: ServeSettings) -> ServeSettings:
    """The settings of one process: of the threads that nobody has asked for by number, it gets its part."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    part = max(1, cores // settings.processes)
    changes = {"threads": settings.threads or part}
    if "decode_threads" not in settings.model_fields_set:
        changes["decode_threads"] = part
    return settings.model_copy(update=changes)


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of the host, bound and not yet listening. Raises PatchsightError."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sockets.append(opened := socket.socket(family, kind, protocol))
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            free = address[1] or (sockets[0].getsockname()[1] if len(sockets) > 1 else 0)
            opened.bind((address[0], free, *address[2:]))
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise PatchsightError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return sockets


@dataclass
class Child:
    """One process. slot: 0 to `processes` - 1, the place that it has."""

    slot: int
    process: SpawnProcess
    report: Connection  # tells that it lives, and whether it answers, about once a second
    born: float
    heard: float
    failures: int  # processes of this slot that died young in a row, before it
    answers: bool = False
    behind: bool = False  # a reload was asked for while it started


class Supervisor:
    """Keeps a process in every slot. The first starts alone: what it finds out and writes down, as the trial of the
    engines, the others find there."""

    def __init__(self, settings: ServeSettings, sockets: list[socket.socket], folder: Path) -> None:
        self._settings, self._sockets, self._folder = settings, sockets, folder
        self._children: dict[int, Child] = {}
        self._due: dict[int, tuple[float, int]] = {0: (0.0, 0)}  # by slot: when to start a process, after how many
        self._complete = False  # all slots have answered
        self._leave_by: float | None = None
        self._terminal = os.isatty(0)
        self._clean = True
        # An engine that hangs is the process's own affair. One that is silent for longer cannot help itself.
        self._silence_s = max(LEAST_SILENCE_S, 2 * settings.batch_timeout_s)

    def run(self) -> bool:
        """Until all have left. False if one could not start, or did not leave as it should."""
        with self._signals():
            while self._children or not self._leaving():
                self._start_due()
                ends: list[Connection | int] = [child.process.sentinel for child in self._children.values()]
                ends += [child.report for child in self._children.values() if not child.report.closed]
                wait(ends, timeout=0.2)
                for child in list(self._children.values()):
                    self._look_at(child)
        return self._clean

    def _leaving(self) -> bool:
        return self._leave_by is not None

    def _start_due(self) -> None:
        now = time.monotonic()
        for slot in [slot for slot, (at, _) in self._due.items() if at <= now]:
            if self._leaving():
                return
            _, failures = self._due.pop(slot)
            report, told = SPAWN.Pipe(duplex=False)
            arguments = (self._settings, self._sockets, told, self._folder, slot)
            process = SPAWN.Process(target=child_main, args=arguments, name=f"patchsight-{slot}")
            process.start()
            told.close()  # the child's alone: its end is then the end of the child
            self._children[slot] = Child(slot, process, report, now, now, failures)
            if self._leaving():  # the signal came in between
                process.terminate()

    def _look_at(self, child: Child) -> None:
        self._listen_to(child)
        now = time.monotonic()
        if child.process.exitcode is not None:
            self._ended(child, child.process.exitcode)
        elif self._leave_by is not None and now > self._leave_by:
            self._kill(child, "does not leave")
        elif self._leave_by is None and now > child.heard + self._silence_s:
            self._kill(child, f"has been silent for {self._silence_s:g} s")

    def _listen_to(self, child: Child) -> None:
        try:
            while not child.report.closed and child.report.poll():
                answers, child.heard = child.report.recv(), time.monotonic()
                if answers and not child.answers:
                    child.answers = True
                    self._answers(child)
        except (EOFError, OSError):  # it has died; its exit code comes in a moment
            child.report.close()

    def _kill(self, child: Child, why: str) -> None:
        logger.error("process %d %s: killed", child.process.pid, why)
        child.process.kill()
        child.process.join(GRACE_S)

    def _answers(self, child: Child) -> None:
        logger.info("process %d answers", child.process.pid)
        if child.behind:
            self._reload(child)
        if self._complete:
            return
        if len(self._children) < self._settings.processes:
            self._due |= dict.fromkeys(range(1, self._settings.processes), (0.0, 0))
        elif all(each.answers for each in self._children.values()):
            self._complete = True
            host, port = self._sockets[0].getsockname()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            logger.info("%d processes running on http://%s", self._settings.processes, address)

    def _ended(self, child: Child, status: int) -> None:
        del self._children[child.slot]
        child.report.close()
        retire(self._folder, child.slot)
        pid = child.process.pid
        if self._leaving():
            if status and (child.answers or status != -signal.SIGTERM):
                logger.error("process %d left with status %d", pid, status)
                self._clean = False
        elif not self._complete and not child.answers:
            logger.error("process %d could not start: status %d", pid, status)
            self._clean = False
            self._leave(signal.SIGTERM)
        else:
            now = time.monotonic()
            failures = 0 if child.answers and now - child.born > STABLE_S else child.failures + 1
            pause = min(2.0 ** (failures - 2), LONGEST_PAUSE_S) if failures > 1 else 0.0
            logger.error("process %d died with status %d; another takes its place in %g s", pid, status, pause)
            self._due[child.slot] = (now + pause, failures)

    def _leave(self, sig: int) -> None:
        """Pass a signal on. From the first one on nobody is replaced, and the port is given up with the last process
        that listens on it."""
        settings = self._settings
        if self._leave_by is None:
            self._leave_by = time.monotonic() + settings.drain_delay_s + settings.drain_timeout_s + GRACE_S
            for opened in self._sockets:
                opened.close()
        for child in self._children.values():
            if child.process.is_alive() and child.process.pid is not None:
                os.kill(child.process.pid, sig if child.answers else signal.SIGTERM)

    def _hang_up(self) -> None:
        """Every process looks the encoders over; where the terminal is gone, all leave."""
        if self._terminal and not os.isatty(0):
            return self._leave(signal.SIGTERM)
        for child in self._children.values():
            if child.answers:
                self._reload(child)
            child.behind = not child.answers
        return None

    def _reload(self, child: Child) -> None:
        if child.process.is_alive() and child.process.pid is not None:
            os.kill(child.process.pid, signal.SIGHUP)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(sig: int, _: FrameType | None) -> None:
            if sig in FORWARDED:
                self._leave(sig)
            else:
                self._hang_up()

        before = {sig: signal.signal(sig, handle) for sig in (*FORWARDED, *RELOAD)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)
