"""A public encoder as a `Source`: a timm model by its name, or a checkpoint file of DINO, MAE, DINOv2, lightly, …"""

import re
from pathlib import Path
from typing import Any

from patchsight_export.public_encoder import PublicEncoder, PublicViT, wrap
from patchsight_export.public_layout import build_model
from patchsight_export.settings import ExportSettings
from patchsight_export.source import Source
from patchsight_export.weights_file import find_encoder, first_line, read
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import Transform, sha256_of
from patchsight_train.views import MEAN, STD

TIMM = "timm:"
NORMALIZE: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": (MEAN, STD), "half": ((0.5,) * 3, (0.5,) * 3), "none": ((0.0,) * 3, (1.0,) * 3),
}  # fmt: skip
# Said aloud, as they forbid what many users do.
RESTRICTED = ("nc", "noncommercial", "commercial", "dinov3", "fair", "research")


def read_public(settings: ExportSettings) -> tuple[Source, list[str]]:
    """The encoder, and what to say about it, a line each.

    Raises:
        InvalidRequest: there is no such model or file, or it is not an encoder that can be exported.
    """
    source = str(settings.source)
    return _timm(source.removeprefix(TIMM), settings) if source.startswith(TIMM) else _file(Path(source), settings)


def _timm(name: str, settings: ExportSettings) -> tuple[Source, list[str]]:
    """With its weights from the hub, or those of `--checkpoint`, in any layout that timm itself converts."""
    import timm

    if not timm.is_model(name.split(".")[0]):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:12]}*")[:5]) or "none like it"
        raise InvalidRequest(f"{TIMM}{name}: timm {timm.__version__} has no such model; there is {near}")
    told: dict[str, Any] = {}
    if timm.models.is_model_in_modules(name.split(".")[0], ("vision_transformer", "eva")):  # ResNets take any size
        told = {"img_size": settings.image_size} if settings.image_size is not None else {}
        told |= {"dynamic_img_size": True} if settings.dynamic_size else {}
    if settings.checkpoint is not None:
        read(settings.checkpoint)  # what is wrong with the file is better said by us
        told["pretrained_cfg_overlay"] = {"file": str(settings.checkpoint)}
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, **told)
    except Exception as error:  # the hub's errors and torch's have no common base
        raise InvalidRequest(f"{TIMM}{name}: its weights cannot be had: {first_line(error)}") from error
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    size = settings.image_size or int(cfg["input_size"][-1])
    encoder = wrap(model, size, tuple(cfg["mean"]), tuple(cfg["std"]), f"{TIMM}{name}")
    transform = Transform(resize=round(size / cfg.get("crop_pct", 1.0)), filter=cfg["interpolation"], crop=size)
    origin = f"{TIMM}{name}, timm {timm.__version__}"
    if settings.checkpoint is not None:
        origin += f", weights of {settings.checkpoint.name}, sha256 {sha256_of(settings.checkpoint)}"
    license = settings.license or cfg.get("license") or "unstated"
    return _source(encoder, transform, origin, name, license, settings), _said(license)


def _file(path: Path, settings: ExportSettings) -> tuple[Source, list[str]]:
    found = find_encoder(path, settings.prefix)
    model, size, unused = build_model(
        found.weights, settings.image_size, settings.heads, str(path), settings.dynamic_size
    )
    encoder = wrap(model, size, *NORMALIZE[settings.normalize], str(path))
    origin = f"{path.name}, sha256 {sha256_of(path)}, encoder at {found.where}"
    license = settings.license or "unstated"
    lines = [f"{path.name}: the encoder is at {found.where}, {len(found.weights)} tensors"]
    if unused:
        lines.append(f"  not the encoder's, left out: {', '.join(unused)}")
    if found.left_out:
        lines.append("  beside it, left out: " + ", ".join(f"{k} ({n})" for k, n in found.left_out.most_common()))
    transform = Transform(resize=round(size * 256 / 224) if size >= 96 else size, crop=size)
    return _source(encoder, transform, origin, path.stem, license, settings), lines + _said(license)


def _source(
    encoder: PublicEncoder, transform: Transform, origin: str, name: str, license: str, settings: ExportSettings
) -> Source:
    config = encoder.config
    fields = {
        "objective": settings.objective,
        "architecture": _described(encoder.model, encoder),
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "embedding_dim": config.width,
        "num_heads": config.heads,
        "prefix_tokens": config.prefix_tokens,
        "recommended": "cls"
        if config.prefix_tokens and "mae" not in f"{name} {settings.objective}".lower()
        else "mean",
        "transform": transform,
        "data": settings.dataset or "unstated",
        "recipe": f"# {origin}\n",
        "commit": "unknown",
        "license": license,
    }
    return Source(encoder, 0, fields)


def _described(model: Any, encoder: PublicEncoder) -> str:
    config = encoder.config
    if not isinstance(encoder, PublicViT):
        blocks = [len(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4)]
        wide = f", {model.bn1.num_features // 64} times as wide" if model.bn1.num_features > 64 else ""
        return f"ResNet, blocks {'-'.join(map(str, blocks))}{wide}"
    registers = model.num_prefix_tokens - (model.cls_token is not None)
    heads = model.blocks[-1].attn.num_heads
    parts = [f"ViT {config.width}×{len(model.blocks)}", f"{heads} heads", f"patch {config.patch_size}"]
    parts += [f"{registers} registers"] if registers else []
    parts += ["no CLS token"] if model.cls_token is None else []
    parts += ["rotary positions"] if getattr(model, "rope", None) is not None else []
    return ", ".join(parts)


def _said(license: str) -> list[str]:
    words = re.split(r"[^a-z0-9]+", license.lower())
    if not any(word in words for word in RESTRICTED):
        return []
    return [f"LICENSE: {license}: restricted; it travels with the bundle, and the server says it at its start"]
