"""What do attention and patch tokens cost somebody who asks for a plain embedding?

    python benchmarks/outputs.py

Three ways to get `cls_embedding` and `mean_embedding` by ONNX Runtime on one CPU thread: from a graph that has nothing
else (SDPA in every block), and from the graph that is published (explicit softmax in the last block), fetching the two
or all four outputs. Every round runs each of them once, in random order; a ratio is taken within its round. Weights are
random: the time does not depend on them. DESIGN's limit for one graph instead of two is 2 %.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime as ort
import torch
from measure import save
from torch import Tensor, nn

from patchsight_export.to_onnx import OUTPUTS, served, to_onnx
from patchsight_serve.trial_pictures import noise
from patchsight_train.architecture import SIZES, ViTConfig
from patchsight_train.views import eval_view
from patchsight_train.vit import ViT

EMBEDDINGS = OUTPUTS[:2]
ENCODERS = {
    "simclr-vit-cifar10 (ViT 128×4, 32 px)": ViTConfig(width=128, depth=4, heads=4, stem="conv"),
    "ViT-S/16, 224 px": ViTConfig(image_size=224, patch_size=16, **SIZES["small"]),  # type: ignore[arg-type]
}
BATCHES = (1, 4)
ROUND_S = 0.1  # CPU seconds that one way takes in one round, at least


class Plain(nn.Module):
    """The two embeddings alone."""

    def __init__(self, encoder: ViT) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encoder(eval_view(image.permute(0, 3, 1, 2)))
        return tokens[:, 0], tokens[:, self.encoder.config.prefix_tokens :].mean(dim=1)


def session(module: nn.Module, size: int, outputs: tuple[str, ...]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = to_onnx(module, size, outputs).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def ways(config: ViTConfig, batch: int, sessions: Sequence[ort.InferenceSession]) -> dict[str, Callable[[], object]]:
    plain, full = sessions
    feed = {"image": noise(config.image_size, batch)}
    return {
        "plain graph": lambda: plain.run(list(EMBEDDINGS), feed),
        "full graph, embeddings fetched": lambda: full.run(list(EMBEDDINGS), feed),
        "full graph, all fetched": lambda: full.run(list(OUTPUTS), feed),
    }


def measure(ways: dict[str, Callable[[], object]], batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """By way: median CPU ms per image, and the ratio to the plain graph: median and quartiles over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    repeats = {name: repeats_of(run) for name, run in ways.items()}
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            start = time.process_time()
            for _ in range(repeats[name]):
                ways[name]()
            times[name].append((time.process_time() - start) / repeats[name] / batch)
    plain = np.array(times["plain graph"])
    figures = {}
    for name, values in times.items():
        low, middle, high = np.percentile(np.array(values) / plain, (25, 50, 75))
        figures[name] = {
            "cpu_ms_per_image": round(float(np.median(values)) * 1000, 4),
            "ratio": round(float(middle), 4), "ratio_q25": round(float(low), 4), "ratio_q75": round(float(high), 4),
        }  # fmt: skip
    return figures


def repeats_of(run: Callable[[], object]) -> int:
    """Runs that take `ROUND_S`, after one that warms up."""
    run()
    start = time.process_time()
    run()
    return max(1, round(ROUND_S / max(time.process_time() - start, 1e-5)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args(argv)
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    figures: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    print(f"{'CPU ms per image, ratio (quartiles)':<42}{'':>10}{'':>10}")
    for name, config in ENCODERS.items():
        encoder = ViT(config)
        sessions = [
            session(Plain(encoder), config.image_size, EMBEDDINGS),
            session(served(encoder), config.image_size, OUTPUTS),
        ]
        for batch in BATCHES:
            measured = measure(ways(config, batch, sessions), batch, arguments.rounds)
            figures.setdefault(name, {})[f"batch {batch}"] = measured
            print(f"{name}, batch {batch}")
            for way, f in measured.items():
                spread = f"{f['ratio']:.3f} ({f['ratio_q25']:.3f} to {f['ratio_q75']:.3f})"
                print(f"  {way:<40}{f['cpu_ms_per_image']:>10.3f}  {spread}")
            sys.stdout.flush()
    busy = f"load average {os.getloadavg()[0]:.1f} at the end, of which this is 1"
    save("outputs", {"threads": 1, "rounds": arguments.rounds, "other_load": busy, "encoders": figures})


if __name__ == "__main__":
    main()
