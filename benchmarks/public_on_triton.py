"""Graphs of other people's encoders as bundles on a real Triton, asked through the gateway's engine."""

import asyncio
import hashlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from torch import Tensor
from triton_process import TritonProcess

from patchsight_export.public_encoder import PublicEncoder
from patchsight_export.repository import publish
from patchsight_export.to_onnx import with_metadata
from patchsight_serve.encoder import Pixels, RemoteEncoder
from patchsight_serve.manifest import Manifest, Transform
from patchsight_serve.triton_discovery import find_encoders
from patchsight_serve.triton_engine import TritonEngine
from patchsight_serve.triton_models import write_triton_models


@dataclass(frozen=True)
class Case:
    """A graph for any size, and what torch gives for some pictures: for each batch `(N, H, W, 3)` all outputs."""

    family: str
    encoder: PublicEncoder
    graph: onnx.ModelProto
    wanted: Sequence[tuple[Pixels, Sequence[Tensor]]]


def errors(cases: Sequence[Case]) -> dict[str, float]:
    """By family, the largest max|a − b| / max|b| of any output, a from Triton."""
    with tempfile.TemporaryDirectory() as folder:
        bundles = [_publish(case, Path(folder) / "bundles" / _name(case.family)) for case in cases]
        write_triton_models(bundles, Path(folder) / "models", "python")
        triton = TritonProcess(Path(folder) / "models", Path(folder) / "log")
        triton.start()
        try:
            remotes = find_encoders(triton.address, wait_s=30)
            return {case.family: asyncio.run(_error(case, remotes[_name(case.family)])) for case in cases}
        finally:
            triton.stop()


async def _error(case: Case, remote: RemoteEncoder) -> float:
    worst, outputs = 0.0, list(remote.manifest.outputs)
    async with TritonEngine(remote, probe_s=60) as engine:
        for images, wanted in case.wanted:
            results, _ = await engine.run(list(images), outputs)
            for name, right in zip(outputs, wanted, strict=True):
                found = np.stack([result[name] for result in results])  # type: ignore[index]
                worst = max(worst, float(np.abs(found - right.numpy()).max() / right.abs().max()))
    return worst


def _name(family: str) -> str:
    return re.sub("[^a-z0-9]+", "-", family.lower()).strip("-")


def _publish(case: Case, bundle: Path) -> Path:
    config = case.encoder.config
    manifest = Manifest(
        name=bundle.name, sha256="0" * 64, objective="none", architecture="none", parameters=1,
        image_size=config.image_size, patch_size=config.patch_size, embedding_dim=config.width,
        num_heads=config.heads, prefix_tokens=config.prefix_tokens,
        recommended="cls" if config.prefix_tokens else "mean", dynamic_size=True,
        transform=Transform(resize=config.image_size, crop=config.image_size),
        data="none", recipe="none", commit="none", license="none",
    )  # fmt: skip
    model = with_metadata(case.graph, manifest.metadata())
    publish(bundle, manifest.model_copy(update={"sha256": hashlib.sha256(model).hexdigest()}), model)
    return bundle
