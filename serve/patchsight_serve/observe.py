"""The outermost layer of the server: a request's id, its times, its metrics, and the answer when all else failed."""

import logging
import random
import re
import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from patchsight_serve.errors import PatchsightError
from patchsight_serve.logs import log_request
from patchsight_serve.metrics import Metrics
from patchsight_serve.replies import error_reply
from patchsight_serve.timing import Timing

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# On replies that say nothing else: nobody guesses a type, and no page of elsewhere shows them as pictures or scripts.
DEFAULT_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cross-origin-resource-policy", b"same-origin"))
CLIENT_GONE = 499  # as nginx writes it; never sent


def new_id() -> str:
    """128 random bits, of no secret. `uuid4` asks the kernel for them, and in the meantime another thread may take the
    interpreter, for 5 ms."""
    return f"{random.getrandbits(128):032x}"


class Observe:
    """ASGI middleware. Puts `timing` and `request_id` into `request.state`, `X-Request-ID` and `Server-Timing` on the
    reply, and counts. An exception that nobody handled is logged here, and answered with a bare 500.

    leaving: the server will soon close its connections. Replies then end theirs, so that no client sends one more
        request into a connection that is about to close, and loses it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, leaving: Callable[[], bool]) -> None:
        self.app = app
        self.metrics = metrics
        self.leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Observe one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start = time.perf_counter()
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        request_id = given if REQUEST_ID.fullmatch(given) else new_id()
        timing = Timing()
        scope.setdefault("state", {}).update(timing=timing, request_id=request_id)
        status = 0

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name for name, _ in message["headers"]}
                added = [header for header in DEFAULT_HEADERS if header[0] not in names]
                added.append((b"x-request-id", request_id.encode()))
                if any(vars(timing).values()):
                    added.append((b"server-timing", timing.server_timing().encode()))
                message["headers"] = [*message["headers"], *added]
                if self.leaving():
                    MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive, observed)
        except ClientDisconnect:
            status = CLIENT_GONE
        except Exception:
            logger.exception("request %s failed: %s %s", request_id, scope["method"], _as_it_came(scope))
            if status:  # the reply has begun: the connection must break, so that nobody takes it for complete
                raise
            await error_reply(PatchsightError("internal error"))(scope, receive, observed)
        finally:
            # An unknown path has no route, and is no label: anybody can invent new ones.
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if route != "unknown" else "any"
            seconds, error = time.perf_counter() - start, scope["state"].get("error")
            self.metrics.requests.labels(method, route, str(status or CLIENT_GONE)).inc()
            self.metrics.duration.labels(route).observe(seconds)
            if error:
                self.metrics.refused.labels(error).inc()
            log_request(method, route, status or CLIENT_GONE, seconds, timing.images, request_id, error)
        return None


def _as_it_came(scope: Scope) -> str:
    """The path with its percent signs: what they stand for may be the end of a line, and the begin of a forged one."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.decode("ascii", "backslashreplace")
