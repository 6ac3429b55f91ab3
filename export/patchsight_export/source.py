"""What is exported: the encoder of a run folder, rebuilt from its newest checkpoint, and all that is known of it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from patchsight_export.attention import Kind, resolve
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import Manifest, Transform
from patchsight_train import build, checkpoint
from patchsight_train.architecture import EncoderConfig, ResNetConfig, architecture
from patchsight_train.data import eval_transform
from patchsight_train.encoder import Encoder
from patchsight_train.initial import KEPT
from patchsight_train.run import read_config

# In config.toml, but not part of the recipe: fields of their own in the manifest, and what does not change the numbers.
NOT_RECIPE = {
    "objective", "dataset", "license", "commit", "patchsight", "torch", "device", "threads", "checkpoint_every",
    "knn_every", "val_every", "knn_gallery", "knn_queries", "recompute", "compile", "resident", "tensorboard",
    "on_collapse",
}  # fmt: skip
# Nobody's business, but for the last folder's name.
PATHS = {"data", "knn_test", "test", "val", "teacher_labels", "init", "teacher"}


@dataclass(frozen=True)
class Source:
    """An encoder in evaluation mode on the CPU, after `step` updates, and its manifest's fields."""

    encoder: Encoder
    step: int
    fields: dict[str, Any]

    def manifest(self, name: str, sha256: str) -> Manifest:
        return Manifest(name=name, sha256=sha256, **self.fields)

    def recommending(self, output: Literal["cls", "mean", "both"]) -> "Source":
        """The same with another embedding recommended. Raises InvalidRequest if the encoder does not have it."""
        if output != "mean" and not self.encoder.config.prefix_tokens:
            raise InvalidRequest(f"--recommend {output}: this encoder has no CLS token; its embedding is the mean")
        return self.with_fields(recommended=output)

    def serving(self, attention: Kind, dynamic_size: bool) -> "Source":
        """The same with this attention, and any size of pictures. Raises InvalidRequest if it has no such attention."""
        if attention != "last":
            if not self.fields["num_heads"]:
                raise InvalidRequest(
                    f"--attention {attention}: this encoder has no CLS token, and no attention to show"
                )
            attention = resolve(attention, self.encoder.depth)  # type: ignore[arg-type]
        return self.with_fields(attention=attention, dynamic_size=dynamic_size)

    def decoding_scaled(self) -> "Source":
        """The same with large JPEGs decoded at a part of their size."""
        transform: Transform = self.fields["transform"]
        return self.with_fields(transform=transform.model_copy(update={"decoder": "pillow-scaled"}))

    def with_fields(self, **fields: Any) -> "Source":
        """The same with other values in the manifest."""
        return replace(self, fields=self.fields | fields)

    def noted(self, line: str) -> "Source":
        """The same with one more line in front of the recipe: what was done to the encoder after its training."""
        return self.with_fields(recipe=f"# {line}\n{self.fields['recipe']}")


def read_run(run: Path, step: int | None = None) -> Source:
    """The encoder that the run keeps, of the newest complete checkpoint or that of `step`.

    Raises:
        InvalidRequest: `run` is no run folder, has no such checkpoint, or the checkpoint does not fit config.toml.
    """
    config = read_config(run)
    kept = KEPT.get(config.get("objective", ""))
    if kept is None:
        raise InvalidRequest(
            f"{run / 'config.toml'}: objective is {config.get('objective')!r}, not one of {', '.join(KEPT)}"
        )
    saved = checkpoint.load(run, step)
    encoder = build.build_encoder(_architecture(config, run))
    prefix = f"{kept}."
    _load(encoder, {k.removeprefix(prefix): v for k, v in saved.model.items() if k.startswith(prefix)}, run)
    return Source(encoder.eval(), saved.step, _fields(config, encoder, saved.step))


def _architecture(config: dict[str, Any], run: Path) -> EncoderConfig:
    try:
        return architecture(config)
    except KeyError as error:
        raise InvalidRequest(f"{run / 'config.toml'}: {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{run / 'config.toml'}: {error}") from None


def _load(encoder: Encoder, weights: dict[str, Tensor], run: Path) -> None:
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        differences = [line.strip() for line in str(error).splitlines()[1:]]
        raise InvalidRequest(
            f"{run}: its checkpoint is of another architecture than {run / 'config.toml'} says; {differences[0]}"
        ) from None


def _fields(config: dict[str, Any], encoder: Encoder, step: int) -> dict[str, Any]:
    """The manifest, but for `name`, `sha256` and `measured`."""
    net = encoder.config
    pooling = build.recommended_pooling(config, net)
    return {
        "objective": config["objective"],
        "architecture": describe(net),
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "image_size": net.image_size,
        "patch_size": None if isinstance(net, ResNetConfig) else net.patch_size,
        "embedding_dim": net.width,
        "num_heads": None if isinstance(net, ResNetConfig) else net.heads,
        "prefix_tokens": net.prefix_tokens,
        "recommended": cast(Literal["cls", "mean"], pooling),
        "transform": eval_transform(net.image_size),
        "data": config.get("dataset") or "unstated",
        "recipe": recipe(config, step),
        "commit": config.get("commit", "unknown"),
        "license": config.get("license", "unstated"),
    }


def describe(net: EncoderConfig) -> str:
    """For people: `ViT 128×4, 4 heads, patch 4, conv stem`, `ResNet-18, cifar stem`."""
    if isinstance(net, ResNetConfig):
        return f"ResNet-{net.depth}, {net.stem} stem"
    parts = [f"ViT {net.width}×{net.depth}", f"{net.heads} heads", f"patch {net.patch_size}"]
    parts += [f"MLP ratio {net.mlp_ratio:g}"] if net.mlp_ratio != 4 else []
    parts += [f"{net.registers} registers"] if net.registers else []
    parts += ["conv stem"] if net.stem == "conv" else []
    return ", ".join(parts)


def recipe(config: dict[str, Any], step: int) -> str:
    """The settings as TOML that `patchsight-train OBJECTIVE --config` takes, and in its first line what ran them."""
    began = [f"{key} {Path(config[key]).name}" for key in ("init", "teacher") if key in config]
    versions = [f"{key} {config[key]}" for key in ("patchsight", "torch") if key in config]
    told = "; ".join([f"{config['objective']}, step {step} of the training", *began, ", ".join(versions)])
    left_out = NOT_RECIPE | PATHS
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in config.items() if k not in left_out]
    return f"# {told}\n" + "".join(lines)
