"""One of several server processes on a port: what runs in it, and how it keeps in touch with its supervisor."""

import logging
import multiprocessing
import os
import select
import signal
import socket
import threading
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

from fastapi import FastAPI

from patchsight_serve.errors import PatchsightError
from patchsight_serve.logs import set_up
from patchsight_serve.server import Server, run
from patchsight_serve.settings import ServeSettings
from patchsight_serve.shared_metrics import SharedMetrics

logger = logging.getLogger(__name__)


class Told:
    """The way to the supervisor: whether this process answers, about once a second. Who tells that depends: a thread
    as long as it starts, then the event loop, so that a loop that stands still is silent."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._started = threading.Event()
        threading.Thread(target=self._tell_while_starting, daemon=True, name="starting").start()

    def started(self) -> None:
        """From here on the event loop tells."""
        self._started.set()
        self.tell()

    def tell(self) -> None:
        """Say it. A supervisor that is gone or stands still holds nobody up."""
        with suppress(OSError, ValueError):
            if select.select([], [self._connection], [], 0)[1]:
                self._connection.send(self._started.is_set())

    def _tell_while_starting(self) -> None:
        while not self._started.wait(1.0):
            self.tell()


class ChildServer(Server):
    """A server that keeps in touch, and shares its metrics with its sisters."""

    def __init__(self, told: Told, folder: Path, slot: int, app: FastAPI, settings: ServeSettings) -> None:
        super().__init__(app, settings)
        self._told = told
        metrics = self._service.metrics
        metrics.sisters = self._sisters = SharedMetrics(metrics.registry, folder, slot)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._told.started()

    async def on_tick(self, counter: int) -> bool:
        """As the server's; and once a second, publish and tell."""
        if counter % 10 == 0:
            self._sisters.publish()
            self._told.tell()
        return await super().on_tick(counter)


def child_main(
    settings: ServeSettings, sockets: list[socket.socket], connection: Connection, folder: Path, slot: int
) -> None:
    """The whole of a process: serve, until told to leave or left alone."""
    os.setpgid(0, 0)  # Ctrl+C in a terminal is for the supervisor, who passes it on
    set_up(settings.log_level, settings.log_format, settings.access_log, several=True)
    threading.Thread(target=_leave_with_parent, daemon=True, name="parent").start()
    try:
        run(settings, partial(ChildServer, Told(connection), folder, slot), sockets)
    except PatchsightError as error:
        logger.error("%s", error.message)
        raise SystemExit(1) from None


def _leave_with_parent() -> None:
    """A process without a supervisor would hold the port for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
