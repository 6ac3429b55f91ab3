"""The web pages, `/` and `/docs`, and their files in `/static`. They load nothing from elsewhere; a policy says so."""

import os
from pathlib import Path
from types import SimpleNamespace

from fastapi import APIRouter
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

WEB = Path(__file__).parent / "web"

# Labels and metadata come from anybody. The page sets them as text, and should it ever fail to, this lets none of them
# run, load or send anything. `blob:` is for pictures, which are fetched with the API key.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
# Every file is asked for again, and mostly answered with 304: script, style and HTML must be of one version.
FILE_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
PAGE_HEADERS = FILE_HEADERS | {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
}
# Swagger UI has its icons in its style sheet, as data, and turns text into HTML by itself.
DOCS_POLICY = POLICY.partition("; require-trusted-types-for")[0].replace("blob:", "blob: data:")
DOCS_HEADERS = PAGE_HEADERS | {"Content-Security-Policy": DOCS_POLICY}

FILES = SimpleNamespace(path="/static/{file}")


class PageFiles(StaticFiles):
    """The files below `web/`, never taken for another type than the one they are sent as."""

    def __init__(self) -> None:
        super().__init__(directory=WEB)

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """A file, or 304."""
        scope["route"] = FILES  # a mount names none to the counters; what is not there stays unknown to them
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(PAGE_HEADERS if str(full_path).endswith(".html") else FILE_HEADERS)
        return response


def router() -> APIRouter:
    """The two pages."""
    routes = APIRouter()
    routes.get("/", include_in_schema=False)(page)
    routes.get("/docs", include_in_schema=False)(docs)
    return routes


async def page() -> Response:
    """The page, which asks for everything else it needs."""
    return FileResponse(WEB / "index.html", headers=PAGE_HEADERS, media_type="text/html; charset=utf-8")


async def docs() -> Response:
    """Swagger UI, from this server's own files."""
    return FileResponse(WEB / "docs.html", headers=DOCS_HEADERS, media_type="text/html; charset=utf-8")
