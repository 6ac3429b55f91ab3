"""What is exported: the encoder of a run folder, rebuilt from its newest checkpoint, and all that is known of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import Manifest
from patchsight_train import checkpoint
from patchsight_train.architecture import CHOICES, ViTConfig
from patchsight_train.data import eval_transform
from patchsight_train.dino import DINO
from patchsight_train.mae import MAE
from patchsight_train.objective import Objective
from patchsight_train.run import read_config
from patchsight_train.simclr import SimCLR
from patchsight_train.vit import ViT

OBJECTIVES: dict[str, type[Objective]] = {"mae": MAE, "simclr": SimCLR, "dino": DINO}
# In config.toml, but not part of the recipe: fields of their own in the manifest, and what does not change the numbers
# (of which the data's paths are nobody's business).
NOT_RECIPE = {
    "objective", "data", "dataset", "license", "commit", "patchsight", "torch", "device", "threads",
    "checkpoint_every", "knn_test", "knn_every", "knn_gallery", "knn_queries",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """An encoder in evaluation mode on the CPU, after `step` updates, and its manifest's fields."""

    encoder: ViT
    step: int
    fields: dict[str, Any]

    def manifest(self, name: str, sha256: str) -> Manifest:
        return Manifest(name=name, sha256=sha256, **self.fields)


def read_run(run: Path, step: int | None = None) -> Source:
    """The encoder that the run keeps, of the newest complete checkpoint or that of `step`.

    Raises:
        InvalidRequest: `run` is no run folder, has no such checkpoint, or the checkpoint does not fit config.toml.
    """
    config = read_config(run)
    objective = OBJECTIVES.get(config.get("objective", ""))
    if objective is None:
        raise InvalidRequest(
            f"{run / 'config.toml'}: objective is {config.get('objective')!r}, not one of {', '.join(OBJECTIVES)}"
        )
    saved = checkpoint.load(run, step)
    encoder = ViT(_architecture(config, run))
    prefix = objective.encoder_name + "."
    _load(encoder, {k.removeprefix(prefix): v for k, v in saved.model.items() if k.startswith(prefix)}, run)
    return Source(encoder.eval(), saved.step, _fields(config, objective, encoder, saved.step))


def _architecture(config: dict[str, Any], run: Path) -> ViTConfig:
    try:
        return ViTConfig(**{key: config[key] for key in CHOICES})
    except KeyError as error:
        raise InvalidRequest(f"{run / 'config.toml'}: {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{run / 'config.toml'}: {error}") from None


def _load(encoder: ViT, weights: dict[str, Tensor], run: Path) -> None:
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        differences = [line.strip() for line in str(error).splitlines()[1:]]
        raise InvalidRequest(
            f"{run}: its checkpoint is of another architecture than {run / 'config.toml'} says; {differences[0]}"
        ) from None


def _fields(config: dict[str, Any], objective: type[Objective], encoder: ViT, step: int) -> dict[str, Any]:
    """The manifest, but for `name`, `sha256` and `measured`."""
    vit = encoder.config
    return {
        "objective": config["objective"],
        "architecture": describe(vit),
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
        "embedding_dim": vit.width,
        "num_heads": vit.heads,
        "prefix_tokens": vit.prefix_tokens,
        "recommended": cast(Literal["cls", "mean"], objective.pooling),
        "transform": eval_transform(vit.image_size),
        "data": config.get("dataset") or "unstated",
        "recipe": recipe(config, step),
        "commit": config.get("commit", "unknown"),
        "license": config.get("license", "unstated"),
    }


def describe(vit: ViTConfig) -> str:
    """For people: `ViT 128×4, 4 heads, patch 4, conv stem`."""
    parts = [f"ViT {vit.width}×{vit.depth}", f"{vit.heads} heads", f"patch {vit.patch_size}"]
    parts += [f"MLP ratio {vit.mlp_ratio:g}"] if vit.mlp_ratio != 4 else []
    parts += [f"{vit.registers} registers"] if vit.registers else []
    parts += ["conv stem"] if vit.stem == "conv" else []
    return ", ".join(parts)


def recipe(config: dict[str, Any], step: int) -> str:
    """The settings as TOML that `patchsight-train OBJECTIVE --config` takes, and in its first line what ran them."""
    versions = ", ".join(f"{key} {config[key]}" for key in ("patchsight", "torch") if key in config)
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in config.items() if k not in NOT_RECIPE]
    return f"# {config['objective']}, step {step} of the training; {versions}\n" + "".join(lines)
