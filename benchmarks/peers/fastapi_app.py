# mypy: disable-error-code="import-not-found,misc,untyped-decorator,no-any-return,attr-defined,type-arg"
"""Plain FastAPI: one photo, one run of the encoder, in FastAPI's own thread pool.

`uvicorn` with its `standard` extra, a raw body, which is the cheapest that a request can bring, and a bare reply.
"""

from bare_encoder import BareEncoder
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

app = FastAPI()
encoder = BareEncoder.of_environment()


def embed(photo: bytes) -> bytes:
    return encoder.embed([encoder.pixels(photo)]).tobytes()


@app.post("/embed")
async def embed_photo(request: Request) -> Response:
    vector = await run_in_threadpool(embed, await request.body())
    return Response(vector, media_type="application/octet-stream")
