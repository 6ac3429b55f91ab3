"""What is known to load of other people's encoders, and how near the graph comes to their own network's numbers.

    python benchmarks/public_encoders.py    # ten minutes on 2 busy cores

Each layout of `public_layouts.py`, with random weights: written as a checkpoint file, found in it, exported, run by
ONNX Runtime, and compared with timm's or torchvision's forward pass on noise; attention with the softmax of the last
block's own queries and keys, turned where positions are rotary. "any size": all outputs of the graph with
`--dynamic-size`, at a smaller, a larger and an oblong size, against timm's own interpolation by torch; "Triton": the
same numbers, from a real Triton that runs the bundle.
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
from public_on_triton import Case, errors
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
def any_size(
    family: str, encoder: PublicEncoder, outputs: tuple[str, ...], sizes: tuple[tuple[int, int], ...]
) -> tuple[float, Case]:
    """The largest error of any output at any of these sizes, which are not those that the graph was traced with; and
    what Triton is to be asked."""
    module = served(encoder)
    graph = to_onnx(module, encoder.config.image_size, outputs, dynamic=True)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    worst, cases = 0.0, []
    for height, width in sizes:
        images = noise(height, BATCH, width)
        wanted = module(torch.from_numpy(images))
        pairs = zip(session.run(None, {"image": images}), wanted, strict=True)
        worst = max([worst, *(error(found, right) for found, right in pairs)])
        cases.append((images, wanted))
    return worst, Case(family, encoder, graph, cases)


@torch.no_grad()
def vit_row(family: str, model: Any, load: Callable[[bool], PublicEncoder]) -> tuple[dict[str, float], Case]:
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
    row["any size"], case = any_size(family, load(True), outputs, ((14, 14), (42, 42), (56, 21)))
    row["fp16 weights"] = error(run(load(False), images, outputs, half=True)[name], embedding)
    return row, case


@torch.no_grad()
def resnet_row(family: str, layout: str) -> tuple[dict[str, float], Case]:
    trunk, state = resnet(layout)
    images = noise(64, BATCH)
    mean = trunk(eval_view(torch.from_numpy(images).permute(0, 3, 1, 2))).mean(dim=(2, 3))
    full, half = (run(loaded(state, 64), images, ("mean_embedding",), h)["mean_embedding"] for h in (False, True))
    everywhere, case = any_size(family, loaded(state, 64), ("mean_embedding",), ((32, 32), (96, 96), (100, 75)))
    return {"embedding": error(full, mean), "any size": everywhere, "fp16 weights": error(half, mean)}, case


def main() -> None:
    rows: dict[str, tuple[dict[str, float], Case]] = {}
    for family, make in VITS.items():
        model, state = make()
        rows[family] = vit_row(family, model, lambda dynamic, state=state: loaded(state, None, dynamic))  # type: ignore[misc]
        print(family, rows[family][0], flush=True)
    for family, network in NAMED.items():
        rows[family] = vit_row(
            family,
            network(),
            lambda dynamic, network=network: wrap(network(dynamic_img_size=dynamic), 28, MEAN, STD, "timm"),  # type: ignore[misc]
        )
        print(family, rows[family][0], flush=True)
    rows |= {(family := f"ResNet: {layout}"): resnet_row(family, layout) for layout in RESNETS}
    on_triton = errors([case for _, case in rows.values()])
    results = {family: row | {"Triton": on_triton[family]} for family, (row, _) in rows.items()}
    save("public_encoders", {"results": results})
    publish("public_encoders", table(results))
    print(table(results))


def table(results: dict[str, dict[str, float]]) -> str:
    columns = ("embedding", "attention", "any size", "Triton", "fp16 weights")
    lines = ["| layout | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for family, row in results.items():
        cells = [f"{row[column]:.0e}" if column in row else "–" for column in columns]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
