"""Real photos, pictures on disk, and a trainer of a tiny encoder. One thread, on any machine."""

import io
import multiprocessing
import runpy
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Generator, Tensor

from patchsight_serve.sample_gallery import SAMPLES
from patchsight_train.build import build
from patchsight_train.data import Images, load_images
from patchsight_train.loop import Trainer
from patchsight_train.objective import Objective, When
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.randomness import Randomness
from patchsight_train.settings import TrainSettings
from patchsight_train.update import Updater

TINY: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "epochs": 3, "batch_size": 8,
    "warmup_epochs": 1, "device": "cpu", "precision": "fp32", "knn_every": 0,
}  # fmt: skip
SMALL_DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
SMALL_HEADS: dict[str, dict[str, Any]] = {
    "autoencoder": {"bottleneck": 8, **SMALL_DECODER},
    "skip_autoencoder": {"bottleneck": 8, **SMALL_DECODER},
    "mae": SMALL_DECODER,
    "simclr": {"projection_hidden": 32, "projection_width": 16},
    "dino": {"prototypes": 32, "head_hidden": 32, "bottleneck": 16, "local_crops": 2},
    "swav": {"prototypes": 32, "projection_hidden": 32, "projection_width": 16, "local_crops": 2},
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> Generator:
    return Generator().manual_seed(0)


@pytest.fixture(scope="session")
def photos() -> Images:
    """The 200 photos that ship with the project: uint8 `(200, 3, 32, 32)`, with labels."""
    return load_images([str(SAMPLES)], 32, None, Console(file=io.StringIO()))


@pytest.fixture(scope="session")
def pictures() -> Tensor:
    """float32 `(6, 3, 24, 24)` in 0..1: noise, smooth color, gray, black, white, and one saturated color."""
    rng = torch.Generator().manual_seed(3)
    y, x = torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(0, 1, 24), indexing="ij")
    noise = torch.rand(3, 24, 24, generator=rng)
    gray = torch.rand(1, 24, 24, generator=rng).expand(3, -1, -1)
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 24, 24)
    return torch.stack([noise, torch.stack([x, y, 1 - x]), gray, torch.zeros_like(noise), torch.ones_like(noise), red])


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, Any]]:
    """`tiny("mae", **changes)`: all that is chosen for a tiny encoder and head, three epochs."""

    def tiny(objective: str, **changes: Any) -> dict[str, Any]:
        return {"data": ["unread"]} | TINY | SMALL_HEADS.get(objective, {}) | changes

    return tiny


@pytest.fixture
def settings(tiny: Callable[..., dict[str, Any]]) -> Callable[..., TrainSettings]:
    """`settings("mae", **changes)`: the settings of that."""

    def settings(objective: str, **changes: Any) -> TrainSettings:
        return SETTINGS[objective](**tiny(objective, **changes))

    return settings


@pytest.fixture
def objective(settings: Callable[..., TrainSettings]) -> Callable[..., Objective]:
    """`objective("mae", **changes)`: tiny and freshly initialized, always alike."""

    def objective(name: str, **changes: Any) -> Objective:
        torch.manual_seed(0)
        return build(settings(name, **changes))

    return objective


@pytest.fixture
def views(random_pixels: Tensor) -> Callable[..., list[Tensor]]:
    """`views(objective, seed, pixels)`: what it sees of uint8 `(B, 3, n, n)`, by default of `random_pixels`."""

    def views(objective: Objective, seed: int = 0, pixels: Tensor = random_pixels) -> list[Tensor]:
        return objective.views(pixels, Randomness(Generator().manual_seed(seed)))

    return views


@pytest.fixture
def backward() -> Callable[..., dict[str, Tensor]]:
    """`backward(objective, views)`: the gradients of all parts, added up in the parameters; the sums of the metrics."""

    def backward(objective: Objective, views: list[Tensor], epoch: float = 1.0) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        for part, values in objective.parts(views, When(epoch, 0.5)):
            part.backward()  # type: ignore[no-untyped-call]
            metrics = metrics | {name: metrics.get(name, 0) + value for name, value in values.items()}
        return metrics

    return backward


@pytest.fixture
def learn(settings: Callable[..., TrainSettings]) -> Callable[..., tuple[Objective, list[dict[str, float]]]]:
    """`learn("mae", pixels, steps, **changes)`: so many updates on uint8 `(N, 3, S, S)`; the objective, and metrics."""

    def learn(name: str, pixels: Tensor, steps: int, **changes: Any) -> tuple[Objective, list[dict[str, float]]]:
        chosen = settings(name, **{"image_size": pixels.shape[-1], **changes})
        torch.manual_seed(chosen.seed)
        per_epoch = len(pixels) // chosen.batch_size
        total = chosen.epochs * per_epoch
        updater = Updater(build(chosen), chosen, torch.device("cpu"), torch.float32, total, per_epoch)
        found = []
        for step in range(steps):
            rows = torch.randperm(len(pixels), generator=Generator().manual_seed(step))[: chosen.batch_size]
            found.append(updater.update(pixels[rows], step))
        return updater.objective, found

    return learn


@pytest.fixture
def trainer(tmp_path: Path, settings: Callable[..., TrainSettings]) -> Callable[..., Trainer]:
    """`trainer("mae", pixels, run="name", **changes)`: ready to train on uint8 `(N, 3, S, S)`, or to resume."""

    def trainer(objective: str, pixels: Tensor, run: str = "run", **changes: Any) -> Trainer:
        chosen = settings(objective, **{"image_size": pixels.shape[-1], **changes})
        torch.manual_seed(chosen.seed)
        folder = tmp_path / run
        folder.mkdir(exist_ok=True)
        return Trainer(build(chosen), Images(pixels, None), None, chosen, folder, Console(file=io.StringIO()))

    return trainer


@pytest.fixture
def advance() -> Callable[[Trainer, int], list[dict[str, float]]]:
    """`advance(trainer, steps)`: so many updates, without checkpoints; their metrics."""

    def advance(trainer: Trainer, steps: int) -> list[dict[str, float]]:
        found = []
        batches = trainer.images.batches(trainer.orders(), trainer.device)
        for _ in range(steps):
            found.append(trainer.updater.update(next(batches), trainer.step))
            trainer.step += 1
        return found

    return advance


@pytest.fixture
def random_pixels() -> Tensor:
    """uint8 `(20, 3, 16, 16)`."""
    return torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=Generator().manual_seed(5))


@pytest.fixture(scope="session")
def draw_pictures() -> Callable[[Path], Path]:
    """`draw_pictures(root)`: twelve 20 × 16 PNGs in two class folders, `cats` and `dogs`."""

    def draw_pictures(root: Path) -> Path:
        rng = np.random.default_rng(11)
        for i in range(12):
            folder = root / ("cats" if i % 2 else "dogs")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
        return root

    return draw_pictures


@pytest.fixture
def picture_folder(draw_pictures: Callable[[Path], Path], tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures")


@pytest.fixture
def forked(tmp_path: Path) -> Iterator[Callable[[str], BaseProcess]]:
    """`forked(code)`: a process that runs this Python code, forked from one that has imported torch already, which
    takes longer than a small training. Its output goes to `tmp_path / "output"`."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        [
            "patchsight_train.__main__",
            "patchsight_train.loop",
            "patchsight_train.build",
            "patchsight_train.evaluation",
            "patchsight_train.defaults",
            "torch._dynamo",
        ]
    )
    started: list[BaseProcess] = []

    def forked(code: str) -> BaseProcess:
        script = tmp_path / f"forked{len(started)}.py"
        script.write_text(
            f"import sys\nsys.stdout = sys.stderr = open({str(tmp_path / 'output')!r}, 'a', buffering=1)\n{code}"
        )
        process = processes.Process(target=runpy.run_path, args=(str(script),))
        process.start()
        started.append(process)
        return process

    yield forked
    for process in started:
        process.kill()
        process.join()
