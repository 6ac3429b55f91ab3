"""Which web pages may call: the server's own, and those of `cors_origins`. Programs are no pages, and are not asked."""

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from patchsight_serve.errors import Forbidden
from patchsight_serve.replies import error_reply
from patchsight_serve.settings import is_loopback

CHANGES_NOTHING = frozenset({"GET", "HEAD", "OPTIONS"})
# What a page may send and read, for starlette's CORSMiddleware.
METHODS = ("GET", "POST", "PATCH", "DELETE")
SENT = ("Authorization", "Content-Type", "X-Request-ID")
READ = ("X-Request-ID", "Server-Timing", "Retry-After", "X-Shape", "X-Dtype", "X-Encoder", "X-Encoder-Sha256")


class OwnPages:
    """ASGI middleware for a server without keys: 403 for what a page of elsewhere posts, changes or removes.

    A browser sends such a request for any page that a user of this machine happens to look at, and CORS only keeps the
    page from reading the reply. With keys this is not needed: a page that has none gets 401.

    loopback: the server listens on loopback alone. Its own pages are then at a loopback address: one under another name
        is a page of elsewhere, whose name was made to point here.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], loopback: bool) -> None:
        self.app = app
        self.origins = frozenset(origins)
        self.loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""
        if (
            scope["type"] == "http"
            and scope["method"] not in CHANGES_NOTHING
            and any(name == b"origin" for name, _ in scope["headers"])  # programs send none
            and not self._may_pass(Headers(scope=scope))
        ):
            error = Forbidden("a page of another origin may not do this; see the setting cors_origins", "Origin")
            await error_reply(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _may_pass(self, headers: Headers) -> bool:
        origin = headers["origin"]
        if origin in self.origins:
            return True
        try:
            page = urlsplit(origin)
            own = page.netloc == headers.get("host") and page.scheme in ("http", "https")
            return own and (not self.loopback or is_loopback(page.hostname or ""))
        except ValueError:  # brackets that hold no address
            return False
