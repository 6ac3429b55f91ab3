"""What the server asks of an engine that runs an encoder. ONNX Runtime, OpenVINO and the fake pass the same
tests of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from patchsight_serve.manifest import Manifest

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Values = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Runtime:
    """What computes an encoder, and how far that can change its numbers."""

    engine: str  # onnxruntime, openvino, triton, fake
    precision: str  # what it computes in: fp32, fp16, bf16, int8
    cosine: float | None = None  # least one of embeddings to ONNX Runtime's, on the trial's pictures; None: not tried


class Described(Protocol):
    """An encoder, wherever it runs."""

    @property
    def manifest(self) -> Manifest:
        """What the encoder promises: names and shapes of its outputs, and the transform of its input."""

    @property
    def runtime(self) -> Runtime:
        """What computes it."""


class Encoder(Described, Protocol):
    """One encoder in this process. `run` may be called from any thread, from one thread at a time."""

    def run(self, images: Pixels, outputs: Sequence[str]) -> dict[str, Values]:
        """Encode a batch.

        images: uint8 `(N, H, W, 3)`, RGB, N >= 1, H = W = `manifest.transform.crop`; other sizes where
            `manifest.dynamic_size`, multiples of `manifest.size_step`.
        outputs: names from `manifest.outputs`.

        Returns float32 `(N, *manifest.outputs[name])` for each name asked for, at another size as `outputs_on`
        says; rows in the order of `images`.
        """


@dataclass(frozen=True)
class RemoteEncoder:
    """An encoder that an NVIDIA Triton runs."""

    manifest: Manifest
    address: str  # grpc://HOST:PORT

    @property
    def runtime(self) -> Runtime:
        """As in `Described`."""
        return Runtime("triton", self.manifest.precision)


def default_name(encoders: Mapping[str, Described]) -> str:
    """Which encoder is meant where none is named: the one that sees the largest pictures, as what people send are
    photos; of those the one with the most parameters; of equals the first."""

    def size(name: str) -> tuple[int, int]:
        manifest = encoders[name].manifest
        return manifest.image_size, manifest.parameters

    return max(encoders, key=size)
