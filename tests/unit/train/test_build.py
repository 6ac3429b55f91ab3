from collections.abc import Callable

import pytest
import torch

from patchsight_train.build import OBJECTIVES, build
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.resnet import ResNet
from patchsight_train.settings import TrainSettings
from patchsight_train.vit import ViT

ALONE = ["autoencoder", "skip_autoencoder", "mae", "simclr", "dino", "swav"]  # the others need a teacher
RESNET = {"backbone": "resnet18", "width": None, "depth": None, "heads": None}


@pytest.mark.parametrize("name", ALONE)
def test_settings_make_their_objective(name: str, settings: Callable[..., TrainSettings]) -> None:
    chosen = settings(name, micro_batch=5, registers=2)
    found = build(chosen)
    assert type(found).__name__.lower() == name.replace("_", "")
    assert type(found) in OBJECTIVES
    assert isinstance(found.kept, ViT)
    assert found.kept.config == chosen.architecture
    assert found.micro_batch == 5
    assert found.pooling == ("mean" if name in ("mae", "autoencoder", "skip_autoencoder") else "cls")


@pytest.mark.parametrize("name", ["autoencoder", "simclr", "dino", "swav"])
def test_resnets_pool_the_mean(name: str, settings: Callable[..., TrainSettings]) -> None:
    found = build(settings(name, **RESNET))
    assert isinstance(found.kept, ResNet)
    assert found.pooling == "mean"


@pytest.mark.parametrize("name", ALONE)
def test_equal_seeds_make_equal_weights(name: str, settings: Callable[..., TrainSettings]) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(torch.cat([p.flatten() for p in build(settings(name)).parameters()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_every_settings_class_has_an_objective() -> None:
    names = {objective.__name__.lower() for objective in OBJECTIVES}
    assert names == {name.replace("_", "") for name in SETTINGS}
