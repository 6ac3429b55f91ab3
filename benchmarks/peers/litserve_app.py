# mypy: disable-error-code="import-not-found,misc,untyped-decorator,no-any-return,attr-defined,type-arg"
"""LitServe: files come as multipart forms and cross to the worker's process, which decodes, batches and encodes.

It has no limit on what waits, only a timeout.
"""

import os
import sys
from typing import Any

import litserve as ls
import numpy as np
from bare_encoder import BareEncoder
from fastapi import Request


class Embedder(ls.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002
        self.encoder = BareEncoder.of_environment()

    def decode_request(self, request: Request) -> np.ndarray[Any, Any]:
        return self.encoder.pixels(request["photo"].file.read())

    def batch(self, inputs: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        return inputs

    def predict(self, images: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        return self.encoder.embed(images)

    def unbatch(self, output: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        return list(output)

    def encode_response(self, output: np.ndarray[Any, Any]) -> dict[str, list[float]]:
        return {"embedding": output.tolist()}


if __name__ == "__main__":
    api = Embedder(max_batch_size=int(os.environ["PEER_BATCH"]), batch_timeout=0.01, api_path="/embed")
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, log_level="warning", generate_client_file=False
    )
