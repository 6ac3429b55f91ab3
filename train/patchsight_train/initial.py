"""`--init`: where the first weights come from, the encoder of another run or that inside an exported bundle."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import Manifest, load_manifest
from patchsight_train import checkpoint
from patchsight_train.architecture import EncoderConfig, ResNetConfig, ViTConfig, architecture
from patchsight_train.build import OBJECTIVES, build_encoder
from patchsight_train.encoder import Encoder, copy_into
from patchsight_train.objective import Objective
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.run import read_config
from patchsight_train.views import eval_view
from patchsight_train.vit import ViT, resize_positions

KEPT = {name: objective.encoder_name for name, objective in zip(SETTINGS, OBJECTIVES, strict=True)}
KEPT["finetune"] = "encoder"  # of patchsight-finetune, which is no objective of patchsight-train
LIMIT = 1e-2  # of max|a − b| / max|b|: room for weights and products in half precision, not for another network


def initialize(objective: Objective, source: Path) -> list[str]:
    """Give every encoder of `objective` that is built like the kept one (DINO has two) the weights of `source`.

    Returns what was done, a line each.

    Raises:
        InvalidRequest: `source` is neither run folder nor bundle, or its encoder is of another architecture; the
            differences are named, and the flags that remove them.
        BundleError: the bundle is damaged.
    """
    found, where = read_encoder(source)
    lines = [f"--init: weights of {where}", *transfer(found, objective.kept)]
    for module in objective.modules():
        if isinstance(module, Encoder) and module is not objective.kept and module.config == objective.kept.config:
            copy_into(module, objective.kept)
    return lines


def read_encoder(source: Path) -> tuple[Encoder, str]:
    """The encoder that a run folder keeps, of its newest checkpoint, or that of a bundle, in evaluation mode on the
    CPU; and what it is, for people. Raises as `initialize`."""
    if is_run(source):
        return _of_run(source)
    if (source / "encoder.json").is_file():
        return _of_bundle(source), f"the bundle {source}"
    raise InvalidRequest(f"--init {source}: neither a run folder (config.toml) nor a bundle (encoder.json) is there")


def architecture_of(source: Path) -> EncoderConfig:
    """That of the encoder which `read_encoder` gives. Raises as `initialize`."""
    return _architecture(source, read_config(source)) if is_run(source) else read_encoder(source)[0].config


def is_run(source: Path) -> bool:
    """Whether that is a run folder, not a bundle."""
    return (source / "config.toml").is_file()


def _architecture(run: Path, config: dict[str, Any]) -> EncoderConfig:
    try:
        return architecture(config)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"{run / 'config.toml'}: describes no encoder: {error}") from None


def _of_run(run: Path) -> tuple[Encoder, str]:
    config = read_config(run)
    kept = KEPT.get(config.get("objective", ""))
    if kept is None:
        raise InvalidRequest(
            f"{run / 'config.toml'}: objective is {config.get('objective')!r}, not one of {list(KEPT)}"
        )
    encoder = build_encoder(_architecture(run, config))
    saved = checkpoint.load(run)
    weights = {k.removeprefix(f"{kept}."): v for k, v in saved.model.items() if k.startswith(f"{kept}.")}
    return _with(encoder, weights, run), f"the run {run}, step {saved.step:,}"


def _of_bundle(bundle: Path) -> Encoder:
    manifest = load_manifest(bundle)
    if manifest.patch_size is None:
        raise InvalidRequest(
            f"--init {bundle}: a ResNet's bundle cannot be trained on, since export joins each batch norm with its "
            "convolution, so that the norm's own weights and statistics are lost; give the run folder instead"
        )
    try:
        from patchsight_train.onnx_weights import read_vit
    except ModuleNotFoundError:
        raise InvalidRequest(
            f"--init {bundle}: reading a bundle needs onnx: pip install 'patchsight[export]'; a run folder does not"
        ) from None
    model = bundle / "1" / "model.onnx"
    config, weights = read_vit(model, manifest)
    encoder = _with(ViT(config), weights, bundle)
    _check(encoder, model, manifest)
    return encoder


def _with(encoder: Encoder, weights: dict[str, Tensor], source: Path) -> Encoder:
    """`encoder`, in evaluation mode, with exactly these weights, as float32."""
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise InvalidRequest(
            f"--init {source}: its weights are not those of the encoder it describes: {first}"
        ) from None
    return encoder.float().eval()


@torch.no_grad()
def _check(encoder: Encoder, model: Path, manifest: Manifest) -> None:
    """The weights do here what the graph does with them. A graph with other operators (another normalization of its
    input, another activation) would look the same as far as weights go, and be silently worth less."""
    S = manifest.transform.crop
    images = np.random.default_rng(0).integers(0, 256, (2, S, S, 3), dtype=np.uint8)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    wanted = session.run(["patch_tokens"], {"image": images})[0]  # embeddings may be whitened behind the encoder
    found = encoder(eval_view(torch.from_numpy(images).permute(0, 3, 1, 2)))[:, encoder.config.prefix_tokens :].numpy()
    found = found.reshape(wanted.shape)
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    if not error <= LIMIT:
        raise InvalidRequest(
            f"--init {model}: a ViT of ours with these weights does not compute what the graph computes (patch tokens "
            f"differ by {error:.2g} of the largest value); such an encoder can be served, not trained on"
        )


@torch.no_grad()
def transfer(source: Encoder, target: Encoder) -> list[str]:
    """Copy all weights; positions are interpolated to the target's image size, and registers that the source lacks stay
    as they were initialized. Returns what was done beyond copying.

    Raises:
        InvalidRequest: the two are of different architectures.
    """
    check_same(source.config, target.config)
    weights = source.state_dict()
    lines: list[str] = []
    if isinstance(source, ViT) and isinstance(target, ViT):
        old, new = source.config, target.config
        weights["pos_embed"] = _positions(source, target)
        if old.grid != new.grid:
            lines += [f"positions interpolated from {old.grid} × {old.grid} patches to {new.grid} × {new.grid}"]
        if target.reg_token is not None and old.registers < new.registers:
            known = [] if source.reg_token is None else [source.reg_token]
            weights["reg_token"] = torch.cat([*known, target.reg_token[:, old.registers :]], dim=1)
            lines += [f"{new.registers - old.registers} of {new.registers} registers are new"]
    target.load_state_dict(weights)
    return lines


def _positions(source: ViT, target: ViT) -> Tensor:
    """`(1, P + L, D)` for the target's prefix and grid."""
    old, new = source.config, target.config
    positions: Tensor = source.pos_embed
    if old.no_embed_class:  # the same as zeros for the prefix
        positions = torch.cat([positions.new_zeros(1, old.prefix_tokens, old.width), positions], dim=1)
    if old.grid != new.grid:
        positions = resize_positions(positions, old.prefix_tokens, (new.grid, new.grid))
    prefix, patches = positions[:, : old.prefix_tokens], positions[:, old.prefix_tokens :]
    return torch.cat([prefix, target.pos_embed[:, old.prefix_tokens : new.prefix_tokens], patches], dim=1)


def check_same(source: EncoderConfig, target: EncoderConfig) -> None:
    """Raises InvalidRequest unless weights of `source` fit into `target`, but for image size and added registers."""
    if type(source) is not type(target):
        kinds = ("ResNet", "Vision Transformer")
        has, wants = (kinds[isinstance(config, ViTConfig)] for config in (source, target))
        raise InvalidRequest(f"--init: there is a {has}, here a {wants}; set --backbone to one of that kind")
    old, new = vars(replace(source, **_free(source, target))), vars(target)
    differences = [name for name in old if old[name] != new[name]]
    if differences:
        named = ", ".join(f"{name} is {old[name]}, here {new[name]}" for name in differences)
        flags = " ".join(_flag(source, name) for name in differences)
        raise InvalidRequest(f"--init: another architecture ({named}); set {flags}")


def _free(source: EncoderConfig, target: EncoderConfig) -> dict[str, Any]:
    """What may differ, by the target's value."""
    free: dict[str, Any] = {"image_size": target.image_size}
    if isinstance(source, ViTConfig) and isinstance(target, ViTConfig):
        free["registers"] = max(source.registers, target.registers)
        free["no_embed_class"] = source.no_embed_class and target.no_embed_class
    return free


def _flag(config: EncoderConfig, name: str) -> str:
    if isinstance(config, ResNetConfig) and name == "depth":
        return f"--backbone resnet{config.depth}"
    return f"--{name.replace('_', '-')} {getattr(config, name)}"
