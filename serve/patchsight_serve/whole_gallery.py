"""`/gallery` as a whole: remove it, carry it away as one file, bring it back; and which galleries there are."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace as changed
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from patchsight_serve import backup, gallery_file
from patchsight_serve.body_file import receive_file
from patchsight_serve.collection import DEFAULT, Galleries
from patchsight_serve.departure import while_connected
from patchsight_serve.embedded_gallery import on_disk
from patchsight_serve.errors import Conflict, InvalidRequest
from patchsight_serve.file_reply import FileReply
from patchsight_serve.galleries import GalleryQuery, described
from patchsight_serve.gallery import Gallery
from patchsight_serve.gallery_file import GalleryFile
from patchsight_serve.gallery_schemas import GalleriesReply, ImportReply, Reembedding, RestoreReply
from patchsight_serve.long_work import LongWork
from patchsight_serve.replies import RAW, json_reply
from patchsight_serve.schemas import ErrorReply
from patchsight_serve.service import Service

SQLITE, PARQUET = "application/vnd.sqlite3", "application/vnd.apache.parquet"
ReplaceQuery = Annotated[bool, Query(description="put it in the place of what is there")]
_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorReply, "description": "No such gallery, or it was removed meanwhile."},
    409: {"model": ErrorReply, "description": "It was replaced meanwhile, or another process has it."},
    507: {"model": ErrorReply, "description": "The disk is full; nothing was changed."},
}
_BODY_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "Not such a file."},
    413: {"model": ErrorReply, "description": "Larger than `max_restore_bytes`."},
    504: {"model": ErrorReply, "description": "The body did not arrive in time."},
    507: {"model": ErrorReply, "description": "The disk is full; nothing was changed."},
}
_FILE: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


def router() -> APIRouter:
    """The seven routes."""
    routes = APIRouter(tags=["gallery"])
    routes.get("/galleries", summary="All galleries", responses={200: {"model": GalleriesReply}})(all_of_them)
    routes.delete("/gallery", summary="Remove a gallery", status_code=204, response_class=Response, responses=_ERRORS)(
        delete
    )
    routes.get(
        "/gallery/backup",
        summary="A gallery as one SQLite file",
        response_class=Response,
        responses={200: {"content": {SQLITE: _FILE}}, **_ERRORS},
    )(take_backup)
    routes.post(
        "/gallery/restore",
        summary="A gallery from its backup",
        openapi_extra={"requestBody": {"required": True, "content": {SQLITE: _FILE, RAW: _FILE}}},
        responses={
            200: {"model": RestoreReply},
            409: {"model": ErrorReply, "description": "There is a gallery of that name."},
            422: {"model": ErrorReply, "description": "The file is damaged."},
            **_BODY_ERRORS,
        },
    )(restore)
    routes.get(
        "/gallery/export",
        summary="Vectors and what is said about them, as Parquet",
        response_class=Response,
        responses={200: {"content": {PARQUET: _FILE}}, **_ERRORS},
    )(take_export)
    routes.post(
        "/gallery/import",
        summary="Add vectors from Parquet",
        openapi_extra={"requestBody": {"required": True, "content": {PARQUET: _FILE, RAW: _FILE}}},
        responses={
            200: {"model": ImportReply},
            404: {"model": ErrorReply, "description": "Not the name of a gallery."},
            409: {"model": ErrorReply, "description": "Another encoder, or another image under an id."},
            **_BODY_ERRORS,
        },
    )(add_file)
    routes.post(
        "/gallery/reembed",
        summary="Have another encoder embed the images",
        status_code=202,
        responses={
            202: {"model": Reembedding},
            404: {"model": ErrorReply, "description": "No such gallery or encoder."},
            409: {"model": ErrorReply, "description": "Another one is at work, or originals were not kept."},
        },
    )(reembed)
    return routes


async def all_of_them(request: Request) -> Response:
    """By name. None of them is opened for it."""
    galleries, _ = _parts(request)
    outlines = await asyncio.to_thread(galleries.outlines)
    told = [{"name": o.name, "count": o.count, "encoder": described(o.encoder)} for o in outlines]
    return json_reply({"galleries": told})


async def delete(request: Request, gallery_name: GalleryQuery = DEFAULT) -> Response:
    """With its images and files. The default gallery is always there: it is emptied, and takes images of any encoder.

    Requests that are at it are answered from it as it was, or with 404.
    """
    galleries, work = _parts(request)
    await work.run(lambda _: galleries.delete(gallery_name))
    return Response(status_code=204)


async def take_backup(request: Request, gallery_name: GalleryQuery = DEFAULT) -> Response:
    """All that was answered before it began, with pictures, and nothing of what came later: a gallery's `restore` gives
    the same answers. Reads and writes go on meanwhile."""
    galleries, work = _parts(request)
    gallery = await asyncio.to_thread(galleries.get, gallery_name)
    async with while_connected(request):
        file = await work.run(lambda left: backup.copy(on_disk(gallery), galleries.scratch, left))
    return FileReply(file, SQLITE, f"{gallery.name}.sqlite")


async def restore(
    request: Request,
    gallery_name: GalleryQuery = DEFAULT,
    replace: ReplaceQuery = False,
    skip_damaged: Annotated[bool, Query(description="leave damaged rows out, in place of 422")] = False,
) -> Response:
    """The file is looked over, page by page and row by row, before anybody sees it; then it takes its place in one
    step. Its encoder need not be loaded."""
    galleries, work = _parts(request)
    await asyncio.to_thread(galleries.check_free, gallery_name, replace)
    async with _received(request) as path:
        async with while_connected(request):
            damaged = await work.run(lambda left: backup.check(path, skip_damaged, left))
        gallery = await work.run(lambda _: galleries.publish(gallery_name, path, replace))
    return json_reply({**await asyncio.to_thread(_told, gallery), "left_out": damaged})


async def take_export(request: Request, gallery_name: GalleryQuery = DEFAULT) -> Response:
    """Columns `id`, `label`, `metadata` (JSON), `sha256` (of the encoded image), `embedding` (of length 1); the key
    `patchsight` of the file's metadata says which encoder. Damaged rows are left out."""
    galleries, work = _parts(request)
    service: Service = request.app.state.service
    outputs = {loaded.identity: loaded.manifest.recommended for loaded in service.loaded.values()}
    gallery = await asyncio.to_thread(galleries.get, gallery_name)
    async with while_connected(request):
        file = await work.run(lambda left: gallery_file.export(gallery, galleries.scratch, outputs, left))
    return FileReply(file, PARQUET, f"{gallery.name}.parquet")


async def add_file(request: Request, gallery_name: GalleryQuery = DEFAULT, replace: ReplaceQuery = False) -> Response:
    """What `export` or `patchsight-embed` wrote: all of it or nothing. Images that come so have no pictures.

    An id that no gallery takes, as a path, goes to `metadata.path`, and the beginning of its sha256 is the id. What is
    there already, by its sha256 or its vector, stays as it is; with `replace` it gets the file's label and metadata.
    """
    galleries, work = _parts(request)
    if await asyncio.to_thread(galleries.exists, gallery_name):
        await asyncio.to_thread(galleries.get, gallery_name)  # where it cannot be opened, nothing need be sent
    async with _received(request) as path, while_connected(request):
        file = await work.run(lambda left: gallery_file.look_over(path, left))
        _check_output(request.app.state.service, file)
        gallery = await asyncio.to_thread(galleries.get, gallery_name, True)
        outcome = await work.run(lambda left: gallery.add_vectors(lambda: file.batches(left), file.encoder, replace))
    return json_reply({**await asyncio.to_thread(_told, gallery), **outcome})


async def reembed(
    request: Request,
    encoder: Annotated[str, Query(description="name of the encoder that the gallery is to be bound to")],
    gallery_name: GalleryQuery = DEFAULT,
) -> Response:
    """From the originals, in the background, after all other work; `GET /gallery` tells how far it is. Until all images
    are done the gallery answers as before; then it is the other encoder's, in one step. Images that are added meanwhile
    are embedded by both. If the server is stopped, asking again goes on from there."""
    galleries, _ = _parts(request)
    gallery = await asyncio.to_thread(galleries.get, gallery_name)
    return json_reply(await request.app.state.reembeddings.begin(gallery, encoder), 202)


def _parts(request: Request) -> tuple[Galleries, LongWork]:
    state = request.app.state
    return state.galleries, state.long_work


@asynccontextmanager
async def _received(request: Request) -> AsyncIterator[Path]:
    """The body as a file, for the block."""
    galleries, _ = _parts(request)
    service: Service = request.app.state.service
    limits = changed(service.body_limits, max_bytes=service.settings.max_restore_bytes)
    folder = await asyncio.to_thread(galleries.scratch.make)
    try:
        await receive_file(request, folder / "body", limits)
        yield folder / "body"
    finally:
        await asyncio.to_thread(galleries.scratch.remove, folder)


def _told(gallery: Gallery) -> dict[str, Any]:
    return {"gallery": gallery.name, "count": len(gallery), "encoder": described(gallery.encoder)}


def _check_output(service: Service, file: GalleryFile) -> None:
    """A gallery holds one kind of an encoder's embeddings. Raises Conflict, InvalidRequest."""
    name = file.encoder.name
    loaded = service.loaded.get(name)
    if loaded is None or loaded.identity != file.encoder:
        if file.output != gallery_file.OUTPUT:
            raise Conflict(
                f"encoder {name!r} (sha256 {file.encoder.sha256[:12]}…) is not loaded, so that nobody can tell whether "
                f"a gallery of it holds {file.output!r}",
                "encoder",
            )
        return
    manifest = loaded.manifest
    if file.output not in (gallery_file.OUTPUT, manifest.recommended):
        raise Conflict(
            f"the file holds {file.output!r} of encoder {name!r}, galleries of it hold {manifest.recommended!r}",
            "encoder",
        )
    (dim,) = manifest.outputs[f"{manifest.recommended}_embedding"]
    if file.dim != dim:
        raise InvalidRequest(
            f"the file's embeddings have {file.dim} numbers, those of {name!r} have {dim}", "embedding"
        )
