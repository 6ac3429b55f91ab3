"""The process: loads the encoders, says what it serves, listens, and leaves without dropping a request.

It also leaves by itself, with status 70, once an encoder hangs: whoever supervises it starts a new one.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from patchsight_serve import memory
from patchsight_serve.app import create_app
from patchsight_serve.connection import Connection, ConnectionLimits, allow_open_files
from patchsight_serve.encoder import Encoder, RemoteEncoder
from patchsight_serve.loader import Loader
from patchsight_serve.reload import Reloader, Source
from patchsight_serve.repository import needed_bundles
from patchsight_serve.service import Service
from patchsight_serve.settings import ServeSettings

logger = logging.getLogger(__name__)

HUNG = 70  # exit status: an internal error, as sysexits.h has it


class Server(uvicorn.Server):
    """On TERM or INT: /readyz turns 503 at once, listening ends after `drain_delay_s`, and what is in work is
    finished, within `drain_timeout_s`. A second signal ends the delay; a second INT ends everything.

    hangups: a HUP is put in here. It has the encoders looked over; from a terminal that is gone it means to leave."""

    def __init__(self, app: FastAPI, settings: ServeSettings) -> None:
        self._service: Service = app.state.service
        metrics = self._service.metrics
        limits = ConnectionLimits(
            settings.max_connections,
            settings.header_timeout_s,
            settings.timeout_s,
            lambda reason: metrics.refused.labels(reason).inc(),
        )
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=partial(Connection, limits),  # type: ignore[arg-type]  # a class is wanted, and only called
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=settings.drain_timeout_s,
            )
        )
        metrics.connections.set_function(lambda: len(self.server_state.connections))
        self._reloader: Reloader = app.state.reloader
        self.hangups: list[int] = []
        self._terminal = os.isatty(0)
        self._exit_at = float("inf")

    @property
    def hung(self) -> bool:
        """An encoder hangs."""
        return self._service.hung

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, once all is loaded."""
        await super().startup(sockets)
        memory.settle()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is in work."""
        await super().shutdown(sockets)
        memory.unsettle()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signature is a signal handler's
        """Begin to leave."""
        again = self._service.draining
        self._service.draining = True
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self._exit_at = 0.0 if again else time.monotonic() + self._service.settings.drain_delay_s

    async def on_tick(self, counter: int) -> bool:
        """Asked by uvicorn ten times a second whether to stop listening. A handler of HUP could not do its work: it
        runs between any two steps of the event loop."""
        if self._service.hung and not self._service.draining:
            self.handle_exit(signal.SIGTERM, None)
        if self.hangups:
            self.hangups.clear()
            if self._terminal and not os.isatty(0):
                self.handle_exit(signal.SIGTERM, None)
            else:
                self._reloader.request()
        if time.monotonic() >= self._exit_at:
            self.should_exit = True
        if counter % 5 == 0:
            now = time.monotonic()
            for connection in cast("set[Connection]", set(self.server_state.connections)):
                connection.check(now)
        return await super().on_tick(counter)


def _encoders(settings: ServeSettings) -> Mapping[str, Encoder | RemoteEncoder]:
    if settings.triton is None:
        loader = Loader(settings)
        return {bundle.name: loader.load(bundle) for bundle in needed_bundles(settings.model_repository)}
    from patchsight_serve.triton_discovery import find_encoders  # gRPC takes its time to load

    return find_encoders(settings.triton, settings.triton_start_s)


def _source(settings: ServeSettings) -> Source:
    """Where a reload looks for encoders."""
    if settings.triton is None:
        return Loader(settings).changes
    from patchsight_serve.triton_discovery import changes

    return partial(changes, settings.triton)


def serve(settings: ServeSettings) -> None:
    """Serve until told to stop. Raises BundleError if an encoder cannot be loaded, or no Triton answers."""
    logger.info("settings\n%s", settings.describe())
    if settings.processes == 1:
        run(settings)
    else:
        from patchsight_serve.processes import supervise  # which needs this module

        supervise(settings)


def run(
    settings: ServeSettings,
    make: Callable[[FastAPI, ServeSettings], Server] = Server,
    sockets: list[socket.socket] | None = None,
) -> None:
    """Serve in this process, on `sockets` where they are bound already. Raises as `serve` does."""
    hangups: list[int] = []  # one that comes while the encoders are loaded is not lost, and ends nothing
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, lambda number, _: hangups.append(number))
    encoders = _encoders(settings)
    for encoder in encoders.values():
        m = encoder.manifest
        (numbers,) = m.outputs[f"{m.recommended}_embedding"]
        logger.info(
            "encoder %s: %s %s, embeddings of %d numbers, sha256 %.12s, trained on %s; license: %s; runs on %s in %s",
            m.name, m.objective, m.architecture, numbers, m.sha256, m.data, m.license,
            encoder.runtime.engine, encoder.runtime.precision,
        )  # fmt: skip
    if (files := allow_open_files(settings.max_connections)) < settings.max_connections:
        logger.warning("only %d files may be open at once, fewer than max_connections", files)
    server = make(create_app(encoders, settings, _source(settings)), settings)
    server.hangups = hangups
    server.run(sockets)
    if server.hung:
        logging.shutdown()
        os._exit(HUNG)  # a usual end would wait for the thread that hangs, or pull memory away from under it
