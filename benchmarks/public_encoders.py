"""What is known to load of other people's encoders, and how near the graph comes to their own network's numbers.

    python benchmarks/public_encoders.py    # ten minutes on 2 busy cores

Each layout of `public_layouts.py`, with random weights: written as a checkpoint file, found in it, exported, run by
ONNX Runtime, and compared with timm's or torchvision's forward pass on noise; attention with the softmax of the last
block's own queries and keys, turned where positions are rotary. "any size": all outputs of the graph with
`--dynamic-size`, at a smaller, a larger and an oblong size, against timm's own interpolation by torch.
Errors are max|a − b| / max|b|. Writes `benchmarks/results/public_encoders.json` and the
table in docs.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from measure import publish, save
from public_layouts import RESNETS, VITS, attention_by_hand, dinov3, resnet, rotary, vit, without_cls
from torch import Tensor

from patchsight_export.half_weights import halve, store_half
from patchsight_export.public_encoder import PublicEncoder, wrap
from patchsight_export.public_layout import build_model
from patchsight_export.to_onnx import OUTPUTS, served, to_onnx
from patchsight_export.weights_file import find_encoder
from patchsight_serve.trial_pictures import noise
from patchsight_train.views import MEAN, STD, eval_view

BATCH = 3
NAMED = {  # by their names in timm
    "timm, absolute": vit, "timm, without CLS (SigLIP)": without_cls, "timm, rotary (EVA)": rotary,
    "timm, rotary (DINOv3)": dinov3,
}  # fmt: skip


def loaded(state: Any, image_size: int | None = None, dynamic: bool = False) -> PublicEncoder:
    """Through a file, as a user's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pth"
        torch.save(state, path)
        model, size, _ = build_model(find_encoder(path).weights, image_size, None, path.name, dynamic)
    return wrap(model, size, MEAN, STD, path.name)


def run(encoder: PublicEncoder, images: np.ndarray, outputs: tuple[str, ...], half: bool) -> dict[str, np.ndarray]:
    if half:
        halve(encoder, images)
    graph = to_onnx(served(encoder), encoder.config.image_size, outputs)
    if half:
        store_half(graph)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(outputs, session.run(None, {"image": images}), strict=True))


def error(found: np.ndarray, wanted: Tensor) -> float:
    return float(np.abs(found - wanted.numpy()).max() / wanted.abs().max())


@torch.no_grad()
def any_size(encoder: PublicEncoder, outputs: tuple[str, ...], sizes: tuple[tuple[int, int], ...]) -> float:
    """The largest error of any output at any of these sizes, which are not those that the graph was traced with."""
    module = served(encoder)
    graph = to_onnx(module, encoder.config.image_size, outputs, dynamic=True)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    worst = 0.0
    for height, width in sizes:
        images = noise(height, BATCH, width)
        pairs = zip(session.run(None, {"image": images}), module(torch.from_numpy(images)), strict=True)
        worst = max([worst, *(error(found, wanted) for found, wanted in pairs)])
    return worst


@torch.no_grad()
def vit_row(model: Any, load: Callable[[bool], PublicEncoder]) -> dict[str, float]:
    """load: the encoder, for its own size or for any."""
    images = noise(28, BATCH)
    x, P = eval_view(torch.from_numpy(images).permute(0, 3, 1, 2)), model.num_prefix_tokens
    tokens = model.forward_features(x)
    outputs, name = (OUTPUTS, "cls_embedding") if P else (("mean_embedding", "patch_tokens"), "mean_embedding")
    embedding = tokens[:, 0] if P else tokens.mean(dim=1)
    found = run(load(False), images, outputs, half=False)
    row = {"embedding": error(found[name], embedding)}
    if P:
        row["attention"] = error(found["attention"], attention_by_hand(model, x)[:, :, 0, P:].reshape(BATCH, -1, 4, 4))
    row["any size"] = any_size(load(True), outputs, ((14, 14), (42, 42), (56, 21)))
    row["fp16 weights"] = error(run(load(False), images, outputs, half=True)[name], embedding)
    return row


@torch.no_grad()
def resnet_row(layout: str) -> dict[str, float]:
    trunk, state = resnet(layout)
    images = noise(64, BATCH)
    mean = trunk(eval_view(torch.from_numpy(images).permute(0, 3, 1, 2))).mean(dim=(2, 3))
    full, half = (run(loaded(state, 64), images, ("mean_embedding",), h)["mean_embedding"] for h in (False, True))
    everywhere = any_size(loaded(state, 64), ("mean_embedding",), ((32, 32), (96, 96), (100, 75)))
    return {"embedding": error(full, mean), "any size": everywhere, "fp16 weights": error(half, mean)}


def main() -> None:
    results = {}
    for family, make in VITS.items():
        model, state = make()
        results[family] = vit_row(model, lambda dynamic, state=state: loaded(state, None, dynamic))  # type: ignore[misc]
        print(family, results[family], flush=True)
    for family, network in NAMED.items():
        results[family] = vit_row(
            network(),
            lambda dynamic, network=network: wrap(network(dynamic_img_size=dynamic), 28, MEAN, STD, "timm"),  # type: ignore[misc]
        )
        print(family, results[family], flush=True)
    results |= {f"ResNet: {layout}": resnet_row(layout) for layout in RESNETS}
    save("public_encoders", {"results": results})
    publish("public_encoders", table(results))
    print(table(results))


def table(results: dict[str, dict[str, float]]) -> str:
    columns = ("embedding", "attention", "any size", "fp16 weights")
    lines = ["| layout | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for family, row in results.items():
        cells = [f"{row[column]:.0e}" if column in row else "–" for column in columns]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
