"""`/gallery` and `/gallery/images`: add images, page through them, look at one, change it, remove it."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from patchsight_serve.bodies import media_type, parse_json, read_body, read_images, read_multipart
from patchsight_serve.collection import DEFAULT, Galleries
from patchsight_serve.errors import InvalidRequest, PatchsightError, Superseded, UnsupportedImage
from patchsight_serve.gallery import Gallery
from patchsight_serve.gallery_schemas import ADD_BODY, PATCH_BODY, AddReply, GalleryImage, GalleryInfo, ImagePage
from patchsight_serve.indexer import Upload, default_id, encoder_of, index_images
from patchsight_serve.item import Added, Changes, Identity, Item, parse_metadata
from patchsight_serve.long_work import short_write
from patchsight_serve.replies import RAW, SHOWN, error_body, image_reply, json_reply
from patchsight_serve.schemas import IMAGE_ERRORS, ErrorReply
from patchsight_serve.service import Service

T = TypeVar("T")
GalleryQuery = Annotated[str, Query(alias="gallery", description="name of the gallery")]
EncoderQuery = Annotated[
    str | None, Query(description="name of the encoder; by default the one that the gallery is bound to")
]
IdPath = Annotated[str, Path(description="of an image in the gallery")]
_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorReply, "description": "Unknown gallery or id."},
    409: {"model": ErrorReply, "description": "Other bytes under this id, or a gallery of another encoder."},
    507: {"model": ErrorReply, "description": "The disk is full; nothing of this request was stored."},
}


def router() -> APIRouter:
    """All routes below `/gallery`."""
    routes = APIRouter(tags=["gallery"])
    routes.get(
        "/gallery",
        summary="The gallery as a whole",
        responses={200: {"model": GalleryInfo}, 404: {"model": ErrorReply, "description": "Unknown gallery."}},
    )(info)
    routes.post(
        "/gallery/images",
        summary="Add images",
        openapi_extra={"requestBody": ADD_BODY},
        responses={200: {"model": AddReply}, **IMAGE_ERRORS, **_ERRORS},
    )(add)
    routes.get("/gallery/images", summary="Page through", responses={200: {"model": ImagePage}, **_ERRORS})(page)
    one = "/gallery/images/{id}"
    routes.get(one, summary="One image", responses={200: {"model": GalleryImage}, **_ERRORS})(get)
    routes.patch(
        one,
        summary="Change label or metadata",
        openapi_extra={"requestBody": PATCH_BODY},
        responses={200: {"model": GalleryImage}, **_ERRORS},
    )(patch)
    routes.delete(one, summary="Remove", status_code=204, response_class=Response, responses=_ERRORS)(delete)
    routes.get(
        f"{one}/thumbnail",
        summary="A small JPEG",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}, **_ERRORS},
    )(thumbnail)
    as_stored = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in (*SHOWN, RAW)}
    routes.get(
        f"{one}/image",
        summary="The image as it was added",
        response_class=Response,
        responses={200: {"content": as_stored}, **_ERRORS},
    )(original)
    return routes


async def info(request: Request, gallery_name: GalleryQuery = DEFAULT) -> Response:
    """How many images, of which encoder, how they are searched, and what other galleries there are."""
    galleries: Galleries = request.app.state.galleries
    gallery = await asyncio.to_thread(galleries.get, gallery_name)

    def told() -> dict[str, Any]:
        return {
            "gallery": gallery.name,
            "count": len(gallery),
            "encoder": described(gallery.encoder),
            "index": gallery.index._asdict(),
            "damaged": gallery.damaged,
            "galleries": galleries.names(),
        }

    return json_reply(
        {**await asyncio.to_thread(told), "reembedding": request.app.state.reembeddings.progress(gallery)}
    )


async def add(
    request: Request,
    gallery_name: GalleryQuery = DEFAULT,
    encoder: EncoderQuery = None,
    id: Annotated[
        str | None, Query(description="of a raw body; by default the first 32 hex digits of the bytes' sha256")
    ] = None,
    label: Annotated[str | None, Query(description="of a raw body")] = None,
    metadata: Annotated[str | None, Query(description="of a raw body: a JSON object")] = None,
    replace: Annotated[bool, Query(description="put the image in the place of another one of its id")] = False,
) -> Response:
    """One result per image, in order; what is answered is on the disk.

    Adding the same bytes under the same id again changes nothing, not even label and metadata, unless `replace` is
    set. A request with one image that fails gets that error's status; with several, the error is in its place.
    """
    service: Service = request.app.state.service
    galleries: Galleries = request.app.state.galleries
    uploads = await _uploads(request, service, {"id": id, "label": label, "metadata": metadata})
    request.state.timing.images = len(uploads)

    async def index() -> list[Added | PatchsightError]:
        gallery = await asyncio.to_thread(galleries.get, gallery_name, True)
        loaded = await asyncio.to_thread(encoder_of, service, gallery, encoder)
        return await index_images(service, gallery, loaded, uploads, replace, timing=request.state.timing)

    try:
        results = await index()
    except Superseded:  # into the gallery that is there now
        results = await index()
    for i, result in enumerate(results):
        if isinstance(result, PatchsightError):
            result.param = result.param or f"images[{i}]"
            if len(results) == 1:
                raise result
    return json_reply({"results": [_result(i, result) for i, result in enumerate(results)]})


async def page(
    request: Request,
    gallery_name: GalleryQuery = DEFAULT,
    cursor: Annotated[str, Query(description="`next_cursor` of the page before")] = "",
    limit: Annotated[int, Query(ge=1, le=1000, description="images per page")] = 100,
) -> Response:
    """Images in the order of their ids. One that is there all the time is on exactly one page."""
    gallery = await asyncio.to_thread(request.app.state.galleries.get, gallery_name)
    images, after = await asyncio.to_thread(gallery.page, cursor, limit)
    return json_reply({"images": [asdict(image) for image in images], "next_cursor": after})


async def get(request: Request, id: IdPath, gallery_name: GalleryQuery = DEFAULT) -> Response:
    """An image's label, metadata and sha256."""
    gallery = await asyncio.to_thread(request.app.state.galleries.get, gallery_name)
    return json_reply(asdict(await asyncio.to_thread(gallery.get, id)))


async def patch(request: Request, id: IdPath, gallery_name: GalleryQuery = DEFAULT) -> Response:
    """What the body does not name stays; a label of null removes it; metadata is replaced as a whole."""
    content = parse_json(await read_body(request, request.app.state.service.body_limits))
    if not isinstance(content, dict) or set(content) - {"label", "metadata"}:
        raise InvalidRequest('the body must be a JSON object with "label", "metadata" or both')
    changes = Changes(**content)  # type: ignore[typeddict-item]
    return json_reply(asdict(await _write(request, gallery_name, lambda gallery: gallery.patch(id, changes))))


async def delete(request: Request, id: IdPath, gallery_name: GalleryQuery = DEFAULT) -> Response:
    """Remove an image for good."""
    await _write(request, gallery_name, lambda gallery: gallery.delete(id))
    return Response(status_code=204)


async def thumbnail(request: Request, id: IdPath, gallery_name: GalleryQuery = DEFAULT) -> Response:
    """At most 160 pixels wide and high."""
    gallery = await asyncio.to_thread(request.app.state.galleries.get, gallery_name)
    return Response(await asyncio.to_thread(gallery.thumbnail, id), media_type="image/jpeg")


async def original(request: Request, id: IdPath, gallery_name: GalleryQuery = DEFAULT) -> Response:
    """Its bytes. What browsers do not show comes as a download; 404 if the server keeps no originals."""
    gallery = await asyncio.to_thread(request.app.state.galleries.get, gallery_name)
    return image_reply(await asyncio.to_thread(gallery.original, id))


def described(encoder: Identity | None) -> dict[str, str] | None:
    """An encoder's identity as in every reply."""
    return encoder._asdict() if encoder else None


async def _write(request: Request, name: str, work: Callable[[Gallery], T]) -> T:
    """A write of moments, to the gallery that is there in the end."""
    galleries: Galleries = request.app.state.galleries
    gallery = await asyncio.to_thread(galleries.get, name)
    try:
        return await short_write(gallery, work, gallery)
    except Superseded:
        gallery = await asyncio.to_thread(galleries.get, name)
        return await short_write(gallery, work, gallery)


async def _uploads(request: Request, service: Service, query: dict[str, str | None]) -> list[Upload | PatchsightError]:
    """The images of a body with their descriptions. Raises what `read_images` raises."""
    kind = media_type(request)
    given = {name: value for name, value in query.items() if value is not None}
    if kind == "multipart/form-data":
        if given:
            raise InvalidRequest(f"with a form, {min(given)!r} belongs in its field 'items'", min(given))
        form = await read_multipart(request, service.body_limits)
        if not form.images:
            raise InvalidRequest("the form has no file in a field named 'images'", "images")
        if unknown := set(form.fields) - {"items"}:
            raise InvalidRequest(f"the form has a field {min(unknown)!r}; text belongs in 'items'", min(unknown))
        items = _items(form.fields.get("items"), len(form.images))
        return [_upload(data, item) for data, item in zip(form.images, items, strict=True)]
    if kind == "application/json":
        raise UnsupportedImage("images are added as a raw body or as multipart/form-data, not as JSON", "Content-Type")
    item: dict[str, Any] = {**given}
    if "metadata" in given:
        item["metadata"] = parse_metadata(given["metadata"])
    return [_upload(data, item) for data in await read_images(request, service.body_limits) if isinstance(data, bytes)]


def _items(text: str | None, count: int) -> list[Any]:
    if text is None:
        return [{}] * count
    try:
        items = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the field 'items' is not JSON: {error}", "items") from None
    if not isinstance(items, list) or len(items) != count:
        said = f"{len(items)} entries" if isinstance(items, list) else "no list"
        raise InvalidRequest(f"the field 'items' has {said} for {count} images", "items")
    return items


def _upload(data: bytes, item: Any) -> Upload | PatchsightError:
    """An image whose description is wrong is an error of its own."""
    if not isinstance(item, dict) or set(item) - {"id", "label", "metadata"}:
        return InvalidRequest('an entry of \'items\' must be an object with "id", "label" and "metadata"', "items")
    try:
        return Upload(data, Item(**{"id": default_id(data), **{k: v for k, v in item.items() if v is not None}}))
    except PatchsightError as error:
        return error


def _result(index: int, result: Added | PatchsightError) -> dict[str, Any]:
    if isinstance(result, PatchsightError):
        return {"index": index, "error": error_body(result)}
    return {"index": index, "id": result.id, "created": result.created}
