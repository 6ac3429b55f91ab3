"""The numbers that fix a Vision Transformer's parameters. Imports no torch: settings are checked against it."""

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class ViTConfig:
    """Everything that fixes the encoder's parameters."""

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


SIZES = {
    "tiny": {"width": 192, "depth": 12, "heads": 3},
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
}

# What a run can choose, by the names of its settings and of config.toml.
CHOICES = tuple(field.name for field in fields(ViTConfig) if field.name != "no_embed_class")
