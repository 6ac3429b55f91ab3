"""A teacher that is never trained: any exported encoder, whatever it learned from, run by ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import load_manifest
from patchsight_train.encoder import chunks
from patchsight_train.views import denormalize

BATCH = 128  # images in one run
ERROR_SEVERITY = 3


class Teacher:
    """A bundle's recommended embedding of any view. No part of a checkpoint: a run's settings name its bundle.

    bundle: the folder `model_repository/NAME`.
    device: where it computes. Its views and embeddings may be anywhere.

    Raises:
        BundleError: the bundle is missing or damaged, or ONNX Runtime cannot use the device. It would fall back to the
            CPU by itself, and be slow without saying so.
    """

    def __init__(self, bundle: Path, device: torch.device) -> None:
        self.manifest = load_manifest(bundle)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = ERROR_SEVERITY
        # It takes turns with torch: threads that spin between two runs would take the student's cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        cuda = device.type == "cuda"
        provider = "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
        try:
            self.session = ort.InferenceSession(
                bundle / "1" / "model.onnx", options,
                providers=[(provider, {"device_id": device.index or 0} if cuda else {})],
            )  # fmt: skip
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BundleError(f"{bundle.name}: ONNX Runtime cannot load 1/model.onnx: {error}") from error
        if provider not in self.session.get_providers():
            raise BundleError(
                f"{bundle.name}: ONNX Runtime has no usable {provider} here; "
                f"install patchsight[gpu], or train with --device cpu"
            )

    @property
    def width(self) -> int:
        """D_t: numbers in an embedding."""
        return self.manifest.outputs[f"{self.manifest.recommended}_embedding"][0]

    def __call__(self, views: Tensor) -> Tensor:
        """Embeddings of normalized views: float `(B, 3, S, S)` to float32 `(B, D_t)` on the same device.

        They are resized where S is not the teacher's own size, and rounded to the 8 bits that its graph takes.
        """
        return self.embed(to_pixels(views, self.manifest.transform.crop))

    def embed(self, pixels: Tensor) -> Tensor:
        """Of pictures in its own size: uint8 `(B, S_t, S_t, 3)` to float32 `(B, D_t)` on the same device."""
        array = pixels.cpu().numpy()
        parts = [self._run(array[rows]) for rows in chunks(len(array), BATCH)]
        return torch.from_numpy(np.concatenate(parts)).to(pixels.device)

    def _run(self, image: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        output: np.ndarray[Any, np.dtype[np.float32]]
        (output,) = self.session.run([f"{self.manifest.recommended}_embedding"], {"image": image})
        return output


def to_pixels(views: Tensor, size: int) -> Tensor:
    """Normalized float `(B, 3, S, S)` to uint8 `(B, size, size, 3)`: antialiased bilinear where S is not `size`."""
    x = denormalize(views.float())
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return (x * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
