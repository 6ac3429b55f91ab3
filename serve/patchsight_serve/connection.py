"""One connection: uvicorn's, with an end to everything that a client may begin and never finish.

uvicorn itself waits for ever for the rest of a request's head, for the rest of a body that nobody reads any more, and
for a client to read its reply. Nothing here costs a timer: a connection notes since when it waits, and the server asks
all of them a few times a second whether one is overdue.
"""

import http
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from patchsight_serve.errors import HeadTooLarge, InvalidRequest, PatchsightError, RequestTimeout, TooManyConnections
from patchsight_serve.replies import error_reply

MAX_HEAD = 64 * 1024  # bytes of a request's line and headers
MAX_PIPELINED = 16  # requests of one connection that wait for an earlier one's answer
PROGRESS = 1024 * 1024  # bytes of a reply that a client reads at least within the time-out, or all of it
BODY_HEADERS = {b"content-length", b"transfer-encoding"}
SPARE_FILES = 256  # open files beside the connections: galleries, encoders, Triton


@dataclass(frozen=True)
class ConnectionLimits:
    """What connections may take; `on_refusal` is told the code of each that is ended."""

    max_connections: int
    header_timeout_s: float  # for a head to be complete, from the connection's opening or the request's first byte
    timeout_s: float  # for the rest of a body that was answered already; for the client to read of its reply
    on_refusal: Callable[[str], object]


class _Part(Enum):
    """What of a request comes next."""

    NOTHING = 0
    HEAD = 1
    BODY = 2


class Connection(HttpToolsProtocol):
    """uvicorn's connection within `limits`. A request that is refused before the application sees it is answered in
    the shape that all errors have, unless another answer is on its way, which the error would fall into."""

    def __init__(self, limits: ConnectionLimits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._part = _Part.NOTHING
        self._waiting_since: float | None = None  # the client owes us a head, or the rest of a body
        self._fruitless = 0  # bytes since a head, or some of a body, was there last
        self._unread_since: float | None = None  # the client owes us to read
        self._unread = 0
        self._error: PatchsightError | None = None  # why the parser was stopped

    @property
    def _busy(self) -> bool:
        """An answer is on its way."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _may_answer(self) -> bool:
        """What is wrong belongs to a request that has no answer yet, and no other request is before it."""
        if self._busy:
            return self._part is _Part.BODY and not self.pipeline and not self.cycle.response_started
        return self._part is not _Part.BODY

    def check(self, now: float) -> None:
        """End what is overdue at `now`, by the monotonic clock."""
        left = self.transport.get_write_buffer_size()
        if not left:
            self._unread_since = None
        elif self._unread_since is None or self._unread - left >= PROGRESS:
            self._unread_since, self._unread = now, left
        elif now - self._unread_since > self._limits.timeout_s:
            self._limits.on_refusal("reply_not_read")
            return self.transport.abort()
        patience = self._limits.timeout_s if self._part is _Part.BODY else self._limits.header_timeout_s
        if self._waiting_since is not None and now - self._waiting_since > patience:
            if self._part is _Part.NOTHING:
                return self.transport.close()
            self._refuse(RequestTimeout(f"the request's head was not complete within {patience:g} s"))
        return None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head, or refuse the connection."""
        super().connection_made(transport)
        self._waiting_since = time.monotonic()
        most = self._limits.max_connections
        if len(self.connections) > most:
            self._refuse(TooManyConnections(f"the server has {most:,} connections, which is its limit"))

    def data_received(self, data: bytes) -> None:
        """Parse."""
        if self._waiting_since is None and not self._busy:
            self._waiting_since = time.monotonic()
        self._fruitless += len(data)
        super().data_received(data)
        if self._fruitless > MAX_HEAD:
            self._refuse(_head_too_large())

    def resume_writing(self) -> None:
        """The client has read almost all that was waiting for it."""
        self._unread_since = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """No request came. A reply that is still waiting to be read is not waited for any more."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._part = _Part.HEAD
        self._fruitless = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header. Those that follow a body in chunks are dropped: who let the request in has not seen them."""
        if self._part is _Part.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request over, or stop the parser by raising."""
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD:
            self._error = _head_too_large()
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._error = InvalidRequest(f"more than {MAX_PIPELINED} requests wait on one connection")
        elif self.parser.should_upgrade() and BODY_HEADERS & {name for name, _ in self.headers}:
            self._error = InvalidRequest("a request that asks for an upgrade cannot have a body", "Upgrade")
        if self._error:
            raise self._error
        self._part = _Part.BODY
        self._waiting_since = None
        self._fruitless = 0
        super().on_headers_complete()
        # After an answer that came first, nobody could tell a late body from a next request.
        if self.expect_100_continue:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        self._fruitless = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The last byte of a request."""
        self._part = _Part.NOTHING
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the signature is uvicorn's
        """The parser has stopped."""
        self._refuse(self._error or InvalidRequest("the request is not HTTP/1.1 as it should be"))

    def _unsupported_upgrade_warning(self) -> None:
        """What follows is in a protocol that is not spoken here."""
        self.cycle.keep_alive = False
        if not self._busy:
            self.transport.close()

    def _refuse(self, error: PatchsightError) -> None:
        """Close, with an answer where one is due."""
        if self.transport.is_closing():
            return
        self._limits.on_refusal(error.code)
        if self._may_answer:
            reply = error_reply(error)
            line = f"HTTP/1.1 {reply.status_code} {http.HTTPStatus(reply.status_code).phrase}\r\n".encode()
            headers = [*self.server_state.default_headers, *reply.raw_headers, (b"connection", b"close")]
            fields = b"".join(b"%b: %b\r\n" % header for header in headers)
            self.transport.write(b"%b%b\r\n%b" % (line, fields, bytes(reply.body)))
        self.transport.close()


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the request's head has more than {MAX_HEAD:,} bytes")


def allow_open_files(connections: int) -> int:
    """Raise the process' limit of open files to what so many connections need; how many may be open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
