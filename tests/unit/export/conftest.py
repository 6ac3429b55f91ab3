"""Run folders with random weights, and one bundle exported of them through the command itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from patchsight_export.__main__ import main
from patchsight_train import checkpoint
from patchsight_train.batch_norm import BatchNorm
from patchsight_train.build import build
from patchsight_train.objective import Objective
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.optimizer import adamw
from patchsight_train.resnet import ResNet
from patchsight_train.run import config_of, open_run

# 2 heads that differ, registers, a grid of 4 × 4: nothing that a wrong axis or slice could hide behind.
TINY = {
    "image_size": 16, "patch_size": 4, "width": 24, "depth": 3, "heads": 2, "registers": 2, "threads": 1,
    "dataset": "noise", "license": "CC0-1.0",
}  # fmt: skip
RESNET = {"backbone": "resnet18", "width": None, "depth": None, "heads": None, "registers": 0}


def random_objective(name: str, **settings: Any) -> tuple[Objective, Any]:
    """An objective whose weights are far from their start: attention is not uniform, DINO's teacher not the student."""
    small = RESNET if settings.get("backbone") == "resnet18" else {}
    chosen = SETTINGS[name](data=["nowhere/train.parquet"], **TINY | small | settings)
    torch.manual_seed(1)
    objective = build(chosen)
    with torch.no_grad():
        for parameter in objective.parameters():
            # Convolutions start far from 0 already: more would make numbers that no float holds.
            parameter.add_(torch.randn_like(parameter), alpha=0.0 if parameter.ndim == 4 and small else 0.2)
        if isinstance(objective.kept, ResNet):
            for module in objective.kept.modules():
                if isinstance(module, BatchNorm):
                    module.momentum = 1.0  # statistics of what the layers really see, at once
            objective.kept.train()(torch.randn(16, 3, 16, 16))
    return objective, chosen


def write_run(folder: Path, name: str = "simclr", step: int = 7, **settings: Any) -> Objective:
    """A run folder as patchsight-train leaves it, and what is in its checkpoint."""
    objective, chosen = random_objective(name, **settings)
    open_run(folder, config_of(chosen))
    checkpoint.save(folder, step, objective, adamw(objective, chosen))
    return objective.eval()


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Objective]:
    """`make_run(folder, "simclr", step=7, **settings)`: see `write_run`."""
    return write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SimCLR run, for reading only."""
    folder = tmp_path_factory.mktemp("runs") / "simclr"
    write_run(folder)
    return folder


@pytest.fixture(scope="session")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `run`, for reading only."""
    target = tmp_path_factory.mktemp("export") / "model_repository" / "tiny"
    main([str(run), str(target)])
    return target


@pytest.fixture(scope="session")
def resnet_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a ResNet-18."""
    folder = tmp_path_factory.mktemp("runs") / "resnet"
    write_run(folder, backbone="resnet18")
    return folder


@pytest.fixture(scope="session")
def resnet_bundle(resnet_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `resnet_run`, for reading only."""
    target = tmp_path_factory.mktemp("export") / "model_repository" / "resnet"
    main([str(resnet_run), str(target)])
    return target
