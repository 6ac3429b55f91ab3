"""What a training run can be told: one class per objective. Imports no torch, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import SettingsConfigDict

from patchsight_serve.config import CommandSettings
from patchsight_train.architecture import CHOICES, ViTConfig

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _ascending(scale: tuple[float, float]) -> tuple[float, float]:
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError("two shares of the area are needed, 0 < least <= largest <= 1")
    return scale


CropScale = Annotated[tuple[float, float], AfterValidator(_ascending)]


class TrainSettings(CommandSettings):
    """Settings that every objective has."""

    model_config = SettingsConfigDict(env_prefix="PATCHSIGHT_TRAIN_")
    table = "train"
    objective: ClassVar[str]

    data: list[str] = Field(min_length=1, description="folder of images, Parquet file or glob; repeat for several")
    run: Path | None = Field(None, description="run folder (default: runs/<objective>); the same command resumes it")
    limit: Positive | None = Field(None, description="use only the first images of the data")
    dataset: str = Field("", description="what the data is, for the encoder's manifest")
    license: str = Field("unstated", description="terms of the data, for the encoder's manifest")

    image_size: Positive = Field(32, description="pixels; photos are resized and cut to this square")
    patch_size: Positive = Field(4, description="pixels; divides image_size")
    width: Positive = 192
    depth: Positive = 12
    heads: Positive = Field(3, description="divides width")
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    registers: Annotated[int, Field(ge=0)] = 0
    stem: Literal["patch", "conv"] = Field("patch", description="conv: a small convolutional stem (not for MAE)")

    epochs: Positive = 100
    batch_size: Annotated[int, Field(ge=2)] = 512
    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate of AdamW at this batch size")
    final_lr: Annotated[float, Field(ge=0)] = 1e-6
    warmup_epochs: Annotated[float, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    final_weight_decay: Annotated[float, Field(ge=0)] | None = Field(None, description="cosine to this, if set")
    beta2: Fraction = 0.95
    clip_grad: Annotated[float, Field(ge=0)] = Field(3.0, description="largest gradient norm; 0 for none")

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device has it")
    threads: Positive | None = Field(None, description="CPU threads (default: torch's own choice)")
    checkpoint_every: Positive = Field(500, description="steps; the last two checkpoints are kept")
    knn_test: list[str] = Field([], description="labelled images to judge by; else a tenth of the labelled data")
    knn_every: Annotated[int, Field(ge=0)] = Field(5, description="epochs between k-NN evaluations; 0 for none")
    knn_gallery: Positive = Field(10_000, description="at most so many labelled images as gallery")
    knn_queries: Positive = Field(2_000, description="at most so many as queries")

    @property
    def architecture(self) -> ViTConfig:
        """The encoder that these settings describe. Raises ValueError where its numbers do not fit together."""
        return ViTConfig(**{name: getattr(self, name) for name in CHOICES})

    @model_validator(mode="after")
    def sizes_fit(self) -> "TrainSettings":
        _ = self.architecture
        return self


class MAESettings(TrainSettings):
    """Masked Autoencoder, arXiv:2111.06377: predict the pixels of the patches that were hidden."""

    objective = "mae"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.75, description="share of the patches that is hidden")
    decoder_width: Positive = Field(128, description="a multiple of 4 and of decoder_heads")
    decoder_depth: Positive = 4
    decoder_heads: Positive = 4
    normalize_pixels: bool = Field(True, description="targets with each patch's own mean and variance removed")
    stem: Literal["patch"] = "patch"

    @model_validator(mode="after")
    def decoder_fits(self) -> "MAESettings":
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4 or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of 4, and decoder_width {self.decoder_width} one of 4 and of "
                f"decoder_heads {self.decoder_heads}"
            )
        return self


class SimCLRSettings(TrainSettings):
    """SimCLR, arXiv:2002.05709: two views of one picture belong together, all others apart."""

    objective = "simclr"
    temperature: Annotated[float, Field(gt=0)] = Field(0.2, description="of NT-Xent; 0.5 suits ResNets, 0.2 ViTs")
    projection_hidden: Positive = 2048
    projection_width: Positive = 128
    crop_scale: CropScale = Field((0.08, 1.0), description="least and largest share of the area")
    color_strength: Annotated[float, Field(ge=0)] = Field(
        0.5, description="s of the paper: 1.0 for photos, 0.5 at 32 px"
    )
    blur: Fraction = Field(0.0, description="probability; 0.5 in the paper, none at 32 px")


class DINOSettings(TrainSettings):
    """DINO, arXiv:2104.14294: a student matches its own moving average on another view of the picture."""

    objective = "dino"
    lr: Annotated[float, Field(gt=0)] = 5e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    final_weight_decay: Annotated[float, Field(ge=0)] | None = 0.4
    beta2: Fraction = 0.999
    prototypes: Positive = Field(
        4096, description="K: width of the head's output; 65,536 in the paper, 1,024 to 4,096 for small data"
    )
    head_hidden: Positive = 2048
    bottleneck: Positive = 256
    student_temperature: Annotated[float, Field(gt=0)] = 0.1
    teacher_temperature: Annotated[float, Field(gt=0)] = Field(0.04, description="above 0.07 training is unstable")
    teacher_momentum: Fraction = Field(0.996, description="at the start; cosine to 1. 0.9995 for batches of 256")
    center_momentum: Fraction = 0.9
    freeze_last_layer_epochs: Annotated[int, Field(ge=0)] = 1
    crop_scale: CropScale = Field((0.4, 1.0), description="least and largest share of the area")


SETTINGS: dict[str, type[TrainSettings]] = {"mae": MAESettings, "simclr": SimCLRSettings, "dino": DINOSettings}
