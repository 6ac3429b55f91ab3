"""An exported encoder as teacher: any bundle, whatever it was trained with, run by ONNX Runtime. It is never trained."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsight_serve.errors import BundleError
from patchsight_serve.manifest import load_manifest
from patchsight_train.distributed import local_rank
from patchsight_train.encoder import chunks
from patchsight_train.settings import TrainSettings
from patchsight_train.views import denormalize

BATCH = 256  # images in one run


class Teacher:
    """A bundle's recommended embedding of any view. It is no part of a checkpoint: a run names its bundle.

    bundle: the folder `model_repository/NAME`.
    device: where it runs. There is no falling back to another.

    Raises:
        BundleError: the bundle is missing or damaged, or ONNX Runtime cannot use the device.
    """

    def __init__(self, bundle: Path, device: torch.device) -> None:
        self.manifest = load_manifest(bundle)
        self.output = f"{self.manifest.recommended}_embedding"
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # It takes turns with torch: threads that spin between two runs would take the student's cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
        try:
            self.session = ort.InferenceSession(bundle / "1" / "model.onnx", options, providers=[provider])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise BundleError(f"{bundle.name}: ONNX Runtime cannot load 1/model.onnx: {error}") from error
        if provider not in self.session.get_providers():
            raise BundleError(
                f"{bundle.name}: ONNX Runtime has no usable {provider} here; install patchsight[gpu], "
                f"or train with --device cpu"
            )

    @property
    def width(self) -> int:
        """D_t: numbers in its embedding."""
        return self.manifest.embedding_dim

    def __call__(self, views: Tensor) -> Tensor:
        """Normalized float `(B, 3, S, S)` to float32 `(B, D_t)` on the same device: its embedding of the same views.

        They are resized (bilinear, antialiased) where its pictures have another size, and rounded to 8 bits.
        """
        return self.embed(to_pixels(views, self.manifest.transform.crop))

    def embed(self, pixels: Tensor) -> Tensor:
        """uint8 `(B, S_t, S_t, 3)` in its own size to float32 `(B, D_t)` on the same device."""
        parts = [
            torch.from_numpy(self.run(pixels[rows].cpu().numpy())) for rows in chunks(len(pixels), BATCH)
        ]
        return torch.cat(parts).to(pixels.device)

    def run(self, pixels: np.ndarray) -> np.ndarray:
        out: np.ndarray = self.session.run([self.output], {"image": pixels})[0]
        return out


def to_pixels(views: Tensor, size: int) -> Tensor:
    """Normalized float `(B, 3, S, S)` to uint8 `(B, size, size, 3)`."""
    x = denormalize(views.float())
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return (x * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def device_of(settings: TrainSettings) -> torch.device:
    """Where the training will run, known before its Trainer is there."""
    cuda = settings.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
