"""From settings to the objective with its encoder, freshly initialized."""

from collections.abc import Mapping
from typing import Any

from patchsight_train.architecture import EncoderConfig, ResNetConfig
from patchsight_train.autoencoder import Autoencoder
from patchsight_train.dino import DINO
from patchsight_train.distillation import Distillation
from patchsight_train.encoder import Encoder, default_pooling
from patchsight_train.mae import MAE
from patchsight_train.objective import Objective
from patchsight_train.objective_settings import (
    SETTINGS,
    AutoencoderSettings,
    DINOSettings,
    DistillationSettings,
    MAESettings,
    SimCLRSettings,
    SkipAutoencoderSettings,
    SoftTargetsSettings,
    SwAVSettings,
)
from patchsight_train.resnet import ResNet
from patchsight_train.settings import TrainSettings
from patchsight_train.simclr import SimCLR
from patchsight_train.skip_autoencoder import SkipAutoencoder
from patchsight_train.soft_targets import SoftTargets
from patchsight_train.swav import SwAV
from patchsight_train.vit import ViT

OBJECTIVES: tuple[type[Objective], ...] = (
    Autoencoder, SkipAutoencoder, MAE, SimCLR, DINO, SwAV, Distillation, SoftTargets,
)  # fmt: skip


def build_encoder(config: EncoderConfig) -> Encoder:
    return ResNet(config) if isinstance(config, ResNetConfig) else ViT(config)


def recommended_pooling(run: Mapping[str, Any], config: EncoderConfig) -> str:
    """Which embedding of a run counts, "cls" or "mean": what its config.toml says, as that of a fine-tuning does; else
    as the objective itself says, of which some cannot be built without their teacher. Raises KeyError for an unknown
    objective."""
    if "pooling" in run:
        return str(run["pooling"])
    kind = dict(zip(SETTINGS, OBJECTIVES, strict=True))[run["objective"]]
    return "mean" if issubclass(kind, MAE | Autoencoder) else default_pooling(config)


def build(settings: TrainSettings) -> Objective:
    """The objective with its freshly initialized encoder."""
    encoder = build_encoder(settings.architecture)
    objective = _objective(encoder, settings)
    objective.micro_batch = settings.micro_batch
    return objective


def _objective(encoder: Encoder, settings: TrainSettings) -> Objective:
    # A subclass before the class it extends.
    match settings:
        case SkipAutoencoderSettings():
            return SkipAutoencoder(_vit(encoder), settings)
        case AutoencoderSettings():
            return Autoencoder(encoder, settings)
        case MAESettings():
            return MAE(_vit(encoder), settings)
        case SimCLRSettings():
            return SimCLR(encoder, settings)
        case DINOSettings():
            return DINO(encoder, settings)
        case SwAVSettings():
            return SwAV(encoder, settings)
        case SoftTargetsSettings():
            return SoftTargets(encoder, settings)
        case DistillationSettings():
            return Distillation(encoder, settings)
        case _:
            raise TypeError(f"no objective for {type(settings).__name__}")


def _vit(encoder: Encoder) -> ViT:
    assert isinstance(encoder, ViT)  # the settings have seen to it
    return encoder
