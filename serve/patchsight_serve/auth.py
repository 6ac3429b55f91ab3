"""Lets a request in, or answers 401 before anything of it is read."""

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from patchsight_serve.errors import Unauthorized
from patchsight_serve.replies import error_reply

# Probes have no key; pages are opened by a browser, which sends one only once the page has asked for it.
OPEN = frozenset({"/", "/livez", "/readyz", "/docs", "/openapi.json"})
OPEN_BELOW = "/static/"


class BearerAuth:
    """ASGI middleware: `Authorization: Bearer KEY` on every path that is not open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""
        if scope["type"] == "http" and not self._may_pass(scope):
            error = Unauthorized("this server needs an API key: Authorization: Bearer KEY", "Authorization")
            await error_reply(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path: str = scope["path"]
        if path in OPEN or path.startswith(OPEN_BELOW):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        # Every key is compared, in constant time: how long it takes says nothing about how much was right.
        matches = [hmac.compare_digest(token.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
