"""Does `patchsight-train dino --data folder/` learn, with nothing else said? On two folders of photos, 700 and 1,485.

    python benchmarks/defaults.py                 # all that the defaults ask for: about 2 hours for each of 6 rows
    python benchmarks/defaults.py --minutes 3     # fewer epochs: so many minutes for each row, 20 in all
    python benchmarks/defaults.py --minutes 3 --only clothing10 dino

The photos are written to a folder without classes, and the command is run as anybody would run it. Then 20-NN and a
linear probe, by the training photos' labels on the test photos, of the encoder as it began and as it ended, and of the
raw pixels at 32 px. Prints the table; a run of all rows also writes `benchmarks/results/defaults.json` and puts the
table into the docs.
"""

import argparse
import io
import resource
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import DATA, publish, save
from rich.console import Console
from torch import Tensor

from patchsight_serve.dataset import read_dataset
from patchsight_train.build import build
from patchsight_train.data import Images, load_images
from patchsight_train.defaults import fill, from_run
from patchsight_train.device import pick_device
from patchsight_train.encoder import Encoder
from patchsight_train.initial import read_encoder
from patchsight_train.linear import linear_probe
from patchsight_train.machine import this_machine
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.probe import embed, knn_predict
from patchsight_train.run import read_config
from patchsight_train.settings import TrainSettings

CPU = torch.device("cpu")
DATASETS = ("clothing10", "caltech101")
OBJECTIVES = ("simclr", "dino", "mae")


class Row(NamedTuple):
    """Accuracies, 0..1, as 20-NN and linear probe."""

    data: str
    objective: str
    picked: str
    epochs: int
    cpu_minutes: float
    pixels: tuple[float, float]
    before: tuple[float, float]
    after: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="of training, for each row (default: as the defaults have it)")
    parser.add_argument("--only", nargs="+", default=[], help="data sets and objectives to run")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for data in chosen(DATASETS, arguments.only):
            folder = write_photos(data, Path(scratch) / data)
            for objective in chosen(OBJECTIVES, arguments.only):
                rows.append(measure(data, objective, folder, Path(scratch) / f"{data}-{objective}", arguments.minutes))
                print(table(rows[-1:]), flush=True)
    text = table(rows)
    print(f"\n{text}")
    if not arguments.only:
        save("defaults", {"minutes_each": arguments.minutes, "rows": [row._asdict() for row in rows]})
        publish("defaults", text)


def chosen(all_of: tuple[str, ...], only: list[str]) -> list[str]:
    """Those that are named, or all where none is."""
    return [name for name in all_of if name in only] or list(all_of)


def write_photos(data: str, folder: Path) -> Path:
    """The training photos as files, without a word about their classes."""
    photos = read_dataset(DATA / data / "train.parquet")
    folder.mkdir()
    for i in range(len(photos)):
        (folder / f"{i:05}.jpg").write_bytes(photos.read(i))
    return folder


def measure(data: str, objective: str, folder: Path, run: Path, minutes: float | None) -> Row:
    """One training by the command, and the probes around it."""
    given = SETTINGS[objective].from_command_line(objective, ["--data", str(folder)])
    before = cpu_seconds()
    flags = ["--data", str(folder), "--run", str(run), *cap(given, run, minutes)]
    subprocess.run([sys.executable, "-m", "patchsight_train", objective, *flags], check=True)
    took = (cpu_seconds() - before) / 60
    settings = from_run(given, read_config(run))
    torch.manual_seed(settings.seed)
    untrained = build(settings)
    trained, _ = read_encoder(run)
    splits = [photos(data, part, settings.image_size) for part in ("train", "test")]
    return Row(
        data, objective, picked(settings), settings.epochs, took, of_pixels(data),
        *(probes(embeddings(encoder, untrained.pooling, splits), splits) for encoder in (untrained.kept, trained)),
    )  # fmt: skip


def cpu_seconds() -> float:
    """Of all commands that were run, on all cores: others may have been at work beside them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cap(given: TrainSettings, run: Path, minutes: float | None) -> list[str]:
    """The flag for as many epochs as fit into `minutes`, if that is less than the defaults have."""
    if minutes is None:
        return []
    device = pick_device("auto")
    settings, _ = fill(given, run, device)
    rate = this_machine(device, settings).images_per_s(settings)
    epochs = max(int(minutes * 60 * rate / len(read_dataset(given.data[0]))), 1)
    return ["--epochs", str(epochs)] if epochs < settings.epochs else []


def picked(settings: TrainSettings) -> str:
    return f"{settings.image_size} px, {settings.patch_size} px patches, batch {settings.batch_size}"


def photos(data: str, part: str, size: int) -> Images:
    return load_images([str(DATA / data / f"{part}.parquet")], size, None, Console(file=io.StringIO()))


@cache
def of_pixels(data: str) -> tuple[float, float]:
    """What needs no encoder."""
    splits = [photos(data, part, 32) for part in ("train", "test")]
    flat = [split.pixels.flatten(1).float() for split in splits]
    mean = flat[0].mean(dim=0)
    return probes([F.normalize(pixels - mean, dim=1) for pixels in flat], splits)


def embeddings(encoder: Encoder, pooling: str, splits: list[Images]) -> list[Tensor]:
    return [embed(encoder, split.pixels, pooling, CPU) for split in splits]


def probes(features: list[Tensor], splits: list[Images]) -> tuple[float, float]:
    """20-NN and linear probe: the first split's labels tell the second's."""
    (gallery, queries), (labels, wanted) = features, [split.labels for split in splits]
    assert labels is not None
    assert wanted is not None
    knn = (knn_predict(gallery, labels, queries, 20) == wanted).double().mean().item()
    return knn, linear_probe(gallery, labels, queries, wanted)


def table(rows: list[Row]) -> str:
    lines = [
        "| photos | objective | picked | epochs | CPU minutes | 20-NN: pixels, before, after | linear probe: same |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        knn, linear = ([scores[i] for scores in (row.pixels, row.before, row.after)] for i in (0, 1))
        cells = [row.data, row.objective, row.picked, str(row.epochs), f"{row.cpu_minutes:.0f}"]
        cells += [f"{a:.3f}, {b:.3f}, **{c:.3f}**" for a, b, c in (knn, linear)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
