"""What the lessons share: real images, short trainings, probes, and how results are kept.

Every lesson is a script of its own: `python docs/lessons/NAME.py`. It trains small encoders on one CPU core, and writes
`NAME.png`, the plot, and `NAME.json`, the figures with sizes, seeds, commit and CPU minutes.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchsight_train.build import build
from patchsight_train.data import Images, load_images
from patchsight_train.device import pick_precision
from patchsight_train.linear import linear_probe
from patchsight_train.objective import Objective
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.probe import embed, knn_predict
from patchsight_train.run import commit
from patchsight_train.settings import TrainSettings
from patchsight_train.update import Updater, mix

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("PATCHSIGHT_TEST_DATA", HERE.parents[2] / "shared" / "data"))
CPU = torch.device("cpu")

# A ViT that one CPU core trains at some hundred images a second.
SMALL: dict[str, Any] = {
    "data": ["cifar10"], "image_size": 32, "patch_size": 4, "width": 64, "depth": 4, "heads": 2, "batch_size": 128,
    "warmup_epochs": 1, "device": "cpu", "precision": "auto",
}  # fmt: skip

spent: dict[str, float] = {}  # CPU minutes of each training that this script uses


@dataclass(frozen=True)
class Split:
    """train: what is learned from, and the probes' gallery. test: the probes' queries. Both with labels."""

    train: Images
    test: Images


def cifar10(train: int, test: int = 2000, size: int = 32) -> Split:
    """The first images of the official splits, whose rows are shuffled."""
    console = Console(file=io.StringIO())
    return Split(
        load_images([str(DATA / "cifar10" / "train.parquet")], size, train, console),
        load_images([str(DATA / "cifar10" / "test.parquet")], size, test, console),
    )


def settings(objective: str, **changes: Any) -> TrainSettings:
    """`SMALL` with changes."""
    return SETTINGS[objective](**SMALL | changes)


def learn(objective: Objective, chosen: TrainSettings, images: Images) -> list[dict[str, float]]:
    """Train for `chosen.epochs`; what was logged at each step."""
    B = chosen.batch_size
    per_epoch = len(images) // B
    total = chosen.epochs * per_epoch
    dtype = pick_precision("auto", CPU)
    updater = Updater(objective.train(), chosen, CPU, dtype, total, per_epoch)
    log = []
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(mix(chosen.seed, epoch, 1)))
        log.append(updater.update(images.pixels[order[place * B :][:B]], step))
    return log


def trained(images: Images, objective: str, **changes: Any) -> tuple[Objective, list[dict[str, float]]]:
    """A freshly built objective after its training, in evaluation mode, and its log.

    Kept in `runs/lessons`, so that a lesson can be drawn again, or another look at the same encoder, without training.
    """
    chosen = settings(objective, **changes)
    key = f"{objective} {len(images)} {chosen.model_dump_json()}"
    folder = HERE.parents[1] / "runs" / "lessons" / hashlib.sha256(key.encode()).hexdigest()[:16]
    torch.manual_seed(chosen.seed)
    built = build(chosen)
    if not folder.is_dir():
        start = time.process_time()
        log = learn(built, chosen, images)
        folder.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in built.state_dict().items()}, folder / "model.safetensors")
        kept = {"key": key, "cpu_minutes": (time.process_time() - start) / 60, "log": log}
        (folder / "log.json").write_text(json.dumps(kept))
    kept = json.loads((folder / "log.json").read_text())
    built.load_state_dict(load_file(folder / "model.safetensors"))
    spent[key] = kept["cpu_minutes"]
    print(f"{objective} {changes}: {kept['cpu_minutes']:.1f} CPU minutes", flush=True)
    return built.eval(), kept["log"]


def embeddings(objective: Objective, images: Images) -> Tensor:
    """Of the kept encoder, L2-normalized float32 `(N, D)`."""
    return embed(objective.kept, images.pixels, objective.pooling, CPU)


def knn(gallery: Tensor, queries: Tensor, split: Split, k: int = 20) -> float:
    """k-NN accuracy of embeddings, DINO's protocol."""
    assert split.train.labels is not None
    assert split.test.labels is not None
    return (knn_predict(gallery, split.train.labels, queries, k) == split.test.labels).float().mean().item()


def linear(gallery: Tensor, queries: Tensor, split: Split) -> float:
    """Linear-probe accuracy of embeddings."""
    assert split.train.labels is not None
    assert split.test.labels is not None
    return linear_probe(gallery, split.train.labels, queries, split.test.labels)


def quality(objective: Objective, split: Split) -> dict[str, float]:
    """Both probes of the kept encoder's embedding."""
    gallery, queries = embeddings(objective, split.train), embeddings(objective, split.test)
    return {"knn": knn(gallery, queries, split), "linear": linear(gallery, queries, split)}


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def save(name: str, figure: Figure, results: dict[str, Any]) -> None:
    """Keep plot and figures beside the script, and print the figures."""
    figure.savefig(HERE / f"{name}.png", dpi=110, bbox_inches="tight")
    results = {**results, "training_cpu_minutes": round(sum(spent.values()), 1), "commit": commit()}
    (HERE / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


torch.set_num_threads(1)
