"""Servers that decode, and encode nothing: what `overhead.py` compares. `python null_server.py KIND PORT`.

`ours` is patchsight with an encoder that returns zeros; `full` is the same without a place for any, so that all that
is asked of it is refused. `raw` and `upload` are the shortest that FastAPI allows: the same decoder in its threads.
"""

import sys
import tempfile
from collections.abc import Sequence

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from measure import ROOT

from patchsight_serve.app import create_app
from patchsight_serve.decode import decode
from patchsight_serve.encoder import Pixels, Runtime, Values
from patchsight_serve.manifest import load_manifest
from patchsight_serve.server import Server
from patchsight_serve.settings import ServeSettings

MANIFEST = load_manifest(ROOT / "model_repository" / "simclr-vit-tiny-photos")
(WIDTH,) = MANIFEST.outputs[f"{MANIFEST.recommended}_embedding"]


class NullEncoder:
    """Zeros at once."""

    manifest = MANIFEST
    runtime = Runtime("fake", "fp32")

    def run(self, images: Pixels, outputs: Sequence[str]) -> dict[str, Values]:
        """As in `Encoder`."""
        return {name: np.zeros((len(images), *MANIFEST.outputs[name]), np.float32) for name in outputs}


def ours(port: str, full: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--port", port, "--state-dir", folder, "--no-sample-gallery", "--decode-threads", "1"]
        settings = ServeSettings.from_command_line("null_server", flags)
        app = create_app({MANIFEST.name: NullEncoder()}, settings)
        if full:
            app.state.service.loaded[MANIFEST.name].engine.max_queue = 0
        Server(app, settings).run()


def raw() -> FastAPI:
    app = FastAPI()

    @app.post("/embed")
    async def embed(request: Request) -> Response:
        return await answer(await request.body())

    return app


def upload() -> FastAPI:
    app = FastAPI()

    @app.post("/embed")
    async def embed(images: UploadFile) -> Response:
        return await answer(await images.read())

    return app


async def answer(photo: bytes) -> Response:
    await run_in_threadpool(decode, photo, MANIFEST.transform)
    return Response(np.zeros(WIDTH, np.float32).tobytes(), media_type="application/octet-stream")


def main() -> None:
    kind, port = sys.argv[1:]
    if kind in ("raw", "upload"):
        uvicorn.run(raw() if kind == "raw" else upload(), port=int(port), log_level="warning", access_log=False)
    else:
        ours(port, kind == "full")


if __name__ == "__main__":
    main()
