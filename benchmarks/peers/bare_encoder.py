"""The encoder without a server: what every peer wraps, with the same decoder, the same ONNX file and the same threads.

    python benchmarks/peers/bare_encoder.py PHOTOS     # CPU ms of an image, by batch size, as JSON

Needs numpy, Pillow, pydantic, ONNX Runtime and patchsight_serve on the path. The bundle's folder is in PEER_BUNDLE.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from patchsight_serve.decode import decode
from patchsight_serve.manifest import load_manifest

SIZES = (1, 2, 4, 8, 32)


class BareEncoder:
    """One thread, which does not spin."""

    def __init__(self, bundle: Path) -> None:
        manifest = load_manifest(bundle)
        self.transform = manifest.transform
        self._output = f"{manifest.recommended}_embedding"
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors
        model = (bundle / "1" / "model.onnx").read_bytes()
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    @classmethod
    def of_environment(cls) -> "BareEncoder":
        return cls(Path(os.environ["PEER_BUNDLE"]))

    def pixels(self, photo: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 `(crop, crop, 3)`."""
        return decode(photo, self.transform)

    def embed(self, images: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """float32 `(N, D)` of N decoded images."""
        (vectors,) = self._session.run([self._output], {"image": np.stack(images)})
        return np.asarray(vectors, np.float32)


def cost_ms(encoder: BareEncoder, photos: Sequence[bytes], size: int) -> float:
    """CPU ms of an image, all `photos` once: decoded, stacked to batches of `size`, and encoded."""
    encoder.embed([encoder.pixels(photo) for photo in photos[:size]])
    began = time.process_time()
    for first in range(0, len(photos), size):
        encoder.embed([encoder.pixels(photo) for photo in photos[first : first + size]])
    return 1000 * (time.process_time() - began) / len(photos)


def main() -> None:
    photos = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
    encoder = BareEncoder.of_environment()
    print(json.dumps({size: cost_ms(encoder, photos, size) for size in SIZES}))


if __name__ == "__main__":
    main()
