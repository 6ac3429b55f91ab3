"""A checkpoint of somebody else's training: which of its tensors are the encoder's, under the encoder's own names.

Such files nest the encoder (`teacher`, `model`, `state_dict`, …) and prefix its names (`module.backbone.`). It is found
by the tensor that every encoder begins with, and what lies beside it (heads, other networks, optimizers) is left out
and counted. Nothing is un-pickled but tensors and plain containers.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchsight_serve.errors import InvalidRequest

# The first layer of a ViT, of a ResNet, and of a ResNet that was put into a Sequential, as lightly does.
# Of SimCLRv2's, as it is converted from TensorFlow, the first layer has a stem around it.
FIRST = ("patch_embed.proj.weight", "conv1.weight", "0.weight", "net.0.0.weight")
# Of several encoders in one file the one to serve, best first: a teacher before its student (DINO, section 5.1).
PREFERRED = ("teacher", "ema", "", "momentum", "target", "student", "online")
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Found:
    """weights: by name, float32, without prefix. where: the encoder's place in the file. left_out: how many tensors lie
    elsewhere, by the first part of their names."""

    weights: dict[str, Tensor]
    where: str
    left_out: Counter[str]


def find_encoder(path: Path, prefix: str | None = None) -> Found:
    """The encoder in a checkpoint. prefix: its place, where the file alone does not tell.

    Raises:
        InvalidRequest: the file is not there, no checkpoint, or holds no encoder or several that are equally likely.
    """
    tensors = dict(flat(read(path)))
    convolutions = [name for name, x in tensors.items() if x.ndim == 4]
    places = {name[: -len(first)] for first in FIRST for name in convolutions if f".{name}".endswith(f".{first}")}
    places = {p for p in places if not any(p != q and p.startswith(q) and _within(p[len(q) :]) for q in places)}
    if prefix is not None:
        wanted = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
        if not any(name.startswith(wanted) for name in tensors):
            raise InvalidRequest(f"{path}: --prefix {prefix}: no tensor begins so; there are {_sample(tensors)}")
        place = wanted
    else:
        place = _choose(path, places, tensors)
    weights = {name.removeprefix(place): x.float() for name, x in tensors.items() if name.startswith(place)}
    others = Counter(name.split(".")[0] for name in tensors if not name.startswith(place))
    return Found(weights, place.rstrip(".") or "the top level", others)


def read(path: Path) -> Mapping[str, Any]:
    """The file's content. Raises InvalidRequest."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS))
    except FileNotFoundError:
        raise InvalidRequest(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InvalidRequest(f"{path}: a folder, but no run of patchsight-train: config.toml is missing") from None
    if not start:
        raise InvalidRequest(f"{path}: is empty")
    if start == LFS:
        raise InvalidRequest(f"{path}: is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    try:
        content = _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)
    except Exception as error:  # a damaged file can raise nearly anything
        raise InvalidRequest(
            f"{path}: cannot be read as a checkpoint (.pth, .pt, .ckpt, .safetensors): {first_line(error)}"
        ) from None
    if not isinstance(content, Mapping):
        raise InvalidRequest(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def first_line(error: Exception) -> str:
    """Of its message; its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def _pickle(path: Path) -> Any:
    # Official checkpoints keep their command line in a Namespace, which is nothing but attributes.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its dotted name, however deep."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from flat(value, f"{name}.")


def _within(rest: str) -> bool:
    """Whether a place inside of another is a part of that encoder: blocks of ResNets have a conv1 as well."""
    return rest.startswith(("layer", "blocks", "patch_embed", "net.")) or rest.split(".")[0].isdecimal()


def _choose(path: Path, places: set[str], tensors: Mapping[str, Tensor]) -> str:
    if not places:
        raise InvalidRequest(
            f"{path}: holds no encoder that is known: neither {', '.join(FIRST)} is in it; there are {_sample(tensors)}"
        )
    ranked = sorted(places, key=lambda place: (_rank(place), place))
    best = [place for place in ranked if _rank(place) == _rank(ranked[0])]
    if len(best) > 1:
        raise InvalidRequest(f"{path}: holds several encoders; choose one with --prefix: {', '.join(map(repr, best))}")
    return best[0]


def _rank(place: str) -> int:
    words = place.lower()
    kinds = [i for i, kind in enumerate(PREFERRED) if kind and kind in words]
    return min(kinds, default=PREFERRED.index(""))


def _sample(tensors: Mapping[str, Tensor]) -> str:
    names = list(tensors)
    return f"{len(names)} tensors" + (f", such as {', '.join(names[:3])}" if names else "")
