"""The numbers that fix an encoder's parameters. Imports no torch: settings are checked against it."""

from dataclasses import dataclass
from typing import Any, Literal, get_args


@dataclass(frozen=True)
class ViTConfig:
    """Everything that fixes a Vision Transformer's parameters."""

    image_size: int = 32  # pixels; the input is square
    patch_size: int = 4  # pixels; divides image_size
    width: int = 192  # D
    depth: int = 12
    heads: int = 3  # divides width
    mlp_ratio: float = 4.0
    registers: int = 0
    stem: Literal["patch", "conv"] = "patch"  # conv: each output sees beyond its patch, so MAE cannot use it
    no_embed_class: bool = False  # as in timm: the positional embedding covers the patches only

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.stem == "conv" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(
                f"the conv stem halves the picture step by step: patch_size {self.patch_size} is no power of 2"
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """P: CLS and the registers."""
        return 1 + self.registers


@dataclass(frozen=True)
class ResNetConfig:
    """Everything that fixes a ResNet's parameters."""

    image_size: int = 32  # pixels; the input is square
    depth: Literal[18, 50] = 18
    stem: Literal["imagenet", "cifar"] = "cifar"  # cifar: 3×3, stride 1, no pooling, arXiv:2002.05709 App. B.9

    @property
    def width(self) -> int:
        """D: channels of the last map."""
        return 512 if self.depth == 18 else 2048

    @property
    def grid(self) -> int:
        """Cells of the last map along one side."""
        return -(-self.image_size // (32 if self.stem == "imagenet" else 8))

    @property
    def prefix_tokens(self) -> int:
        return 0


EncoderConfig = ViTConfig | ResNetConfig

Backbone = Literal["vit-tiny", "vit-small", "vit-base", "resnet18", "resnet50"]
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
}

# What a run can choose, by the names of its settings and of config.toml; what is None goes by the backbone.
CHOICES = (
    "backbone", "image_size", "patch_size", "width", "depth", "heads", "mlp_ratio", "registers", "stem",
)  # fmt: skip


def architecture(choices: dict[str, Any]) -> EncoderConfig:
    """The encoder that `CHOICES` describe. Raises ValueError where they do not fit together."""
    backbone = choices.get("backbone", "vit-tiny")
    if backbone not in get_args(Backbone):
        raise ValueError(f"unknown backbone {backbone!r}; there are {', '.join(get_args(Backbone))}")
    given = {k: v for k, v in choices.items() if k in CHOICES and k != "backbone" and v is not None}
    if backbone.startswith("vit-"):
        if given.get("stem", "patch") not in ("patch", "conv"):
            raise ValueError(f"{backbone} has no stem {given['stem']!r}; its stems are patch and conv")
        return ViTConfig(**{**SIZES[backbone.removeprefix("vit-")], **given})
    size = given["image_size"]
    stem = given.get("stem", "cifar" if size <= 64 else "imagenet")
    unfit = sorted(given.keys() & {"width", "depth", "heads"})
    if unfit or stem not in ("imagenet", "cifar"):
        raise ValueError(f"{backbone} has no {', '.join(unfit) or f'stem {stem!r}; its stems are imagenet and cifar'}")
    return ResNetConfig(size, 18 if backbone == "resnet18" else 50, stem)
