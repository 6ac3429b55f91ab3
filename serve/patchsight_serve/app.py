"""The HTTP application: routes, middleware, and the one place where errors become status codes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from patchsight_serve import (
    __version__,
    clusters,
    duplicates,
    embeddings,
    galleries,
    gallery_map,
    neighbors,
    openai_api,
    origin,
    page,
    regions,
    status,
    whole_gallery,
)
from patchsight_serve.api_schema import document
from patchsight_serve.auth import BearerAuth
from patchsight_serve.bodies import BodyLimits
from patchsight_serve.collection import Galleries, NoGalleries
from patchsight_serve.decode import Limits
from patchsight_serve.decoders import Decoders
from patchsight_serve.embedded_galleries import EmbeddedGalleries
from patchsight_serve.encoder import Encoder, RemoteEncoder
from patchsight_serve.errors import BundleError, InvalidRequest, NotReady, PatchsightError
from patchsight_serve.loaded import with_engine
from patchsight_serve.long_work import LongWork
from patchsight_serve.metrics import Metrics
from patchsight_serve.observe import Observe
from patchsight_serve.reembedding import Reembeddings
from patchsight_serve.region_search import RegionSearches
from patchsight_serve.reload import Reloader, Source
from patchsight_serve.replies import ErrorResponse, error_reply
from patchsight_serve.sample_gallery import sampling
from patchsight_serve.schemas import ErrorReply
from patchsight_serve.service import Service
from patchsight_serve.settings import ServeSettings, is_loopback
from patchsight_serve.survey import Surveys
from patchsight_serve.visits import Visiting

logger = logging.getLogger(__name__)

DESCRIPTION = """Embeddings, attention and neighbors of images, by encoders that learned without labels.

An error is always `{"error": {"code", "message", "param"}}`. Every reply has an `X-Request-ID`, yours if you send one.
"""

# Of FastAPI, which looks for OpenTelemetry with every request, and may send to where the environment says.
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


def create_app(
    encoders: Mapping[str, Encoder | RemoteEncoder], settings: ServeSettings, source: Source | None = None
) -> FastAPI:
    """The application around loaded encoders, each with an engine that starts and ends with its lifespan.

    source: where a reload looks for encoders; without one there is none.

    Raises BundleError if `settings.encoder` is not among them, PatchsightError where `settings.gallery` is no Milvus.
    """
    if settings.encoder is not None and settings.encoder not in encoders:
        raise BundleError(f"--encoder {settings.encoder!r} is not among the loaded: {', '.join(encoders)}")
    service = _service(encoders, settings)
    app = FastAPI(
        title="patchsight",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
        telemetry=NO_TELEMETRY,
        lifespan=_lifespan,
        middleware=[
            Middleware(Observe, metrics=service.metrics, leaving=lambda: service.draining),
            *_middleware_for_pages(settings),
            *([Middleware(BearerAuth, keys=settings.keys)] if settings.keys else []),
            Middleware(Visiting, visits=service.visits),
        ],
        responses={"4XX": {"model": ErrorReply, "description": "The request cannot be answered."}},
        exception_handlers={
            PatchsightError: _on_own_error,
            RequestValidationError: _on_validation_error,
            HTTPException: _on_http_error,
        },
    )
    app.state.service = service
    app.state.reloader = Reloader(service, source)
    app.state.galleries = _galleries(settings)
    if isinstance(app.state.galleries, EmbeddedGalleries):
        service.metrics.watch_galleries(app.state.galleries.held, settings.state_dir.absolute())
    app.state.surveys = Surveys()
    app.state.maps = gallery_map.Maps()
    app.state.region_searches = RegionSearches(service)
    app.state.long_work = LongWork()
    app.state.reembeddings = Reembeddings(service, app.state.galleries, app.state.long_work)
    app.include_router(embeddings.router())
    app.include_router(galleries.router())
    app.include_router(whole_gallery.router())
    app.include_router(neighbors.router())
    app.include_router(regions.router())
    app.include_router(duplicates.router())
    app.include_router(clusters.router())
    app.include_router(gallery_map.router())
    app.include_router(openai_api.router())
    app.include_router(status.router())
    app.include_router(page.router())
    app.mount("/static", page.PageFiles(), name="static")
    document(app)
    return app


def _middleware_for_pages(settings: ServeSettings) -> list[Middleware]:
    """Before keys are asked for: a browser asks what it may send without one."""
    layers = []
    if settings.origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.origins,
                allow_methods=origin.METHODS,
                allow_headers=origin.SENT,
                expose_headers=origin.READ,
            )
        )
    if not settings.keys:
        layers.append(Middleware(origin.OwnPages, origins=settings.origins, loopback=is_loopback(settings.host)))
    return layers


def _galleries(settings: ServeSettings) -> Galleries:
    folder = settings.state_dir / "galleries"
    if settings.milvus is not None:
        try:
            from patchsight_serve.milvus_galleries import MilvusGalleries  # pymilvus takes seconds to load
        except ModuleNotFoundError as error:
            raise PatchsightError(f"--gallery needs pip install 'patchsight[milvus]': {error}") from None
        return MilvusGalleries(*settings.milvus, settings.gallery_token.get_secret_value(), folder / ".scratch")
    if settings.processes == 1:
        return EmbeddedGalleries(folder, settings.keep_originals, settings.exact_limit)
    return NoGalleries(settings.processes)


def _service(encoders: Mapping[str, Encoder | RemoteEncoder], settings: ServeSettings) -> Service:
    metrics = Metrics()
    return Service(
        loaded={name: with_engine(encoder, settings, metrics) for name, encoder in encoders.items()},
        settings=settings,
        limits=Limits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_pixels),
        body_limits=BodyLimits(settings.max_body_bytes, settings.max_images, settings.timeout_s),
        decoders=Decoders(settings.decode_threads),
        metrics=metrics,
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    async with AsyncExitStack() as stack:
        stack.callback(service.decoders.close)
        await stack.enter_async_context(app.state.reloader)
        try:
            await service.prove_ready()  # the first inference is slow: better now than for a user
        except NotReady as error:
            logger.error("not ready at start: %s", error)
        await asyncio.to_thread(app.state.galleries.scratch.clear)
        stack.callback(app.state.galleries.close)
        stack.callback(app.state.surveys.close)
        stack.callback(app.state.maps.close)
        stack.push_async_callback(asyncio.to_thread, app.state.long_work.close)
        stack.push_async_callback(app.state.reembeddings.close)
        if service.settings.sample_gallery and service.settings.processes == 1:
            await stack.enter_async_context(sampling(service, app.state.galleries))
        yield
        service.draining = True


async def _on_own_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PatchsightError)
    if error.status == 500:
        logger.error("request %s: %s", request.state.request_id, error)
    return error_reply(error)


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][1:]] or [str(first["loc"][0])]
    return error_reply(InvalidRequest(f"{'.'.join(path)}: {first['msg']}", ".".join(path)))


async def _on_http_error(_: Request, error: Exception) -> Response:
    """What the framework itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    body = {"code": code, "message": str(error.detail), "param": None}
    return ErrorResponse(body, error.status_code, error.headers)
