"""What the server says about itself: its encoders, whether it is well, and its metrics."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel
from starlette.responses import Response

from patchsight_serve.encoder import Described
from patchsight_serve.outputs import available
from patchsight_serve.replies import json_reply
from patchsight_serve.schemas import EncoderInfo, EncoderList, ErrorReply
from patchsight_serve.service import Service


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"]


class Ready(BaseModel):
    """Every encoder runs."""

    status: Literal["ready"]


def router() -> APIRouter:
    """All routes that take nothing and change nothing."""
    routes = APIRouter()
    routes.get("/encoders", tags=["encoders"], summary="List the encoders", responses={200: {"model": EncoderList}})(
        encoders
    )
    routes.get(
        "/encoders/{name}",
        tags=["encoders"],
        summary="One encoder",
        responses={200: {"model": EncoderInfo}, 404: {"model": ErrorReply, "description": "Unknown encoder."}},
    )(encoder)
    no_key: dict[str, Any] = {"security": []}
    routes.get("/livez", tags=["health"], summary="Alive", openapi_extra=no_key, responses={200: {"model": Alive}})(
        livez
    )
    routes.get(
        "/readyz",
        tags=["health"],
        summary="Able to answer",
        openapi_extra=no_key,
        responses={
            200: {"model": Ready},
            503: {"model": ErrorReply, "description": "Not able to answer right now."},
        },
    )(readyz)
    routes.get(
        "/metrics",
        tags=["health"],
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )(metrics)
    return routes


async def encoders(request: Request) -> Response:
    """All loaded encoders, by name."""
    service: Service = request.app.state.service
    return json_reply({"encoders": [_info(e, service) for e in service.loaded.values()], "failed": service.failed})


async def encoder(request: Request, name: Annotated[str, Path(description="name of an encoder")]) -> Response:
    """One encoder, with its manifest."""
    service: Service = request.app.state.service
    return json_reply(_info(service.encoder(name), service))


async def livez() -> Response:
    """The process answers. Says nothing about the encoders: restarting on that is for /readyz to prevent."""
    return json_reply({"status": "alive"})


async def readyz(request: Request) -> Response:
    """200 if every encoder has run lately, or runs now; 503 if one does not, or the server is shutting down."""
    await request.app.state.service.prove_ready()
    return json_reply({"status": "ready"})


async def metrics(request: Request) -> Response:
    """In Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _info(encoder: Described, service: Service) -> dict[str, Any]:
    manifest = encoder.manifest
    return {
        "name": manifest.name,
        "sha256": manifest.sha256,
        "default": manifest.name == service.default_encoder,
        "outputs": {output: manifest.outputs[name] for output, name in available(manifest).items()},
        "runtime": asdict(encoder.runtime),
        "manifest": manifest.model_dump(),
    }
