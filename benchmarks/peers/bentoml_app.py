# mypy: disable-error-code="import-not-found,misc,untyped-decorator,no-any-return,attr-defined,type-arg"
"""BentoML: a batchable API of pictures; its dispatcher finds the size of the batches and how long to wait for them.

A picture that BentoML has opened is brought to the encoder's size by the same code as everywhere: `decode` is reading
the header, which BentoML has done, and `fit`. Over `max_concurrency` it answers 429.
"""

import os

import bentoml
import numpy as np
from bare_encoder import BareEncoder
from PIL.Image import Image

from patchsight_serve.decode import fit


@bentoml.service(
    workers=1,
    traffic={"timeout": 30, "max_concurrency": int(os.environ["PEER_QUEUE"])},
    logging={"access": {"enabled": False}},
    http={"host": "127.0.0.1", "port": int(os.environ["PEER_PORT"])},
)
class Embedder:
    def __init__(self) -> None:
        self.encoder = BareEncoder.of_environment()

    @bentoml.api(batchable=True, max_batch_size=int(os.environ["PEER_BATCH"]), max_latency_ms=10_000, route="/embed")
    def embed(self, photos: list[Image]) -> np.ndarray:
        return self.encoder.embed([fit(photo.convert("RGB"), self.encoder.transform) for photo in photos])
