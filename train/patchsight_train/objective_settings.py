"""The settings of each objective, beside those that all have. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from patchsight_serve.config import number
from patchsight_train.settings import CropScale, MultiCrop, NonNegative, Positive, Share, TrainSettings, ViTOnly


class AutoencoderSettings(TrainSettings):
    """Autoencoder: the picture through a vector z and back."""

    objective = "autoencoder"
    bottleneck: Positive = Field(128, description="numbers in z")
    decoder_width: Positive = Field(128, description="a multiple of 4 and of decoder_heads")
    decoder_depth: Positive = Field(4, description="blocks of the decoder")
    decoder_heads: Positive = Field(4, description="attention heads of the decoder")
    crop_scale: CropScale = Field((0.2, 1.0), description="least and largest share of the area")

    @model_validator(mode="after")
    def decoder_fits(self) -> "AutoencoderSettings":
        _check_decoder(self.decoder_width, self.decoder_heads)
        return self


class SkipAutoencoderSettings(AutoencoderSettings, ViTOnly):
    """Autoencoder whose decoder also sees the encoder's layers, as in a U-Net (arXiv:1505.04597)."""

    objective = "skip_autoencoder"


class MAESettings(ViTOnly):
    """Masked Autoencoder, arXiv:2111.06377: predict the pixels of the patches that were hidden."""

    objective = "mae"
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.75, description="share of the patches that is hidden")
    decoder_width: Positive = Field(128, description="a multiple of 4 and of decoder_heads")
    decoder_depth: Positive = Field(4, description="blocks of the decoder")
    decoder_heads: Positive = Field(4, description="attention heads of the decoder")
    normalize_pixels: bool = Field(True, description="targets with each patch's own mean and variance removed")
    crop_scale: CropScale = Field((0.2, 1.0), description="least and largest share of the area")
    stem: Literal["patch"] | None = Field(None, description="patch: a convolutional stem would see hidden patches")

    @model_validator(mode="after")
    def decoder_fits(self) -> "MAESettings":
        _check_decoder(self.decoder_width, self.decoder_heads)
        if self.architecture.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4")
        return self


def _check_decoder(width: int, heads: int) -> None:
    if width % heads or width % 4:
        raise ValueError(f"decoder_width {width} must be a multiple of 4 and of decoder_heads {heads}")


class SimCLRSettings(TrainSettings):
    """SimCLR, arXiv:2002.05709: two views of one picture belong together, all others apart."""

    objective = "simclr"
    temperature: Annotated[float, Field(gt=0)] = Field(0.2, description="of NT-Xent; 0.5 suits ResNets, 0.2 ViTs")
    projection_layers: Annotated[Literal[2, 3], BeforeValidator(number)] = Field(
        2, description="2 in the paper, 3 in its second version"
    )
    projection_hidden: Positive = Field(2048, description="width of the projection head's hidden layer")
    projection_width: Positive = Field(128, description="numbers in the projection z")
    crop_scale: CropScale = Field((0.08, 1.0), description="least and largest share of the area")
    color_strength: NonNegative = Field(0.5, description="s of the paper: 1.0 for photos, 0.5 at 32 px; 0 for no color")
    gray: Share = Field(0.2, description="probability of a gray view")
    blur: Share = Field(0.0, description="probability; 0.5 in the paper, none at 32 px")


class DINOSettings(MultiCrop):
    """DINO, arXiv:2104.14294: a student matches its own moving average on another view of the picture."""

    objective = "dino"
    lr: Annotated[float, Field(gt=0)] = 5e-4
    weight_decay: NonNegative = 0.04
    final_weight_decay: NonNegative | None = 0.4
    beta2: Share = 0.999
    prototypes: Positive = Field(
        4096, description="K: width of the head's output; 65,536 in the paper, 1,024 to 4,096 for small data"
    )
    head_hidden: Positive = Field(2048, description="width of the head's hidden layers")
    bottleneck: Positive = Field(256, description="numbers before the prototypes")
    student_temperature: Annotated[float, Field(gt=0)] = Field(0.1, description="of the student's softmax")
    teacher_temperature: Annotated[float, Field(gt=0)] = Field(0.04, description="above 0.07 training is unstable")
    warmup_teacher_temperature: Annotated[float, Field(gt=0)] = Field(0.04, description="at the start; linear from it")
    warmup_teacher_epochs: NonNegative = Field(0, description="epochs until teacher_temperature; 30 in the paper")
    teacher_momentum: Share = Field(0.996, description="at the start; cosine to 1. 0.9995 for batches of 256")
    center_momentum: Share = Field(0.9, description="1: no centering, the center stays 0")
    freeze_last_layer_epochs: NonNegative = Field(1, description="first epochs in which prototypes stay as they are")


class SwAVSettings(MultiCrop):
    """SwAV, arXiv:2006.09882: each view predicts the other's assignment to prototypes."""

    objective = "swav"
    prototypes: Positive = Field(512, description="K; 3,000 in the paper, about ten for each expected class")
    projection_hidden: Positive = Field(2048, description="width of the projection head's hidden layer")
    projection_width: Positive = Field(128, description="numbers in the projection z")
    temperature: Annotated[float, Field(gt=0)] = Field(0.1, description="of the softmax over prototypes")
    epsilon: Annotated[float, Field(gt=0)] = Field(0.05, description="of Sinkhorn: above 0.05 assignments get flat")
    sinkhorn_iterations: Positive = Field(3, description="rounds that make prototypes used equally")
    freeze_prototypes_epochs: NonNegative = Field(1, description="first epochs in which prototypes stay as they are")


class DistillationSettings(TrainSettings):
    """Feature distillation: the embedding of any exported encoder, learned by another encoder."""

    objective = "distillation"
    teacher: Path = Field(description="bundle of the teacher: model_repository/NAME")
    crop_scale: CropScale = Field((0.2, 1.0), description="least and largest share of the area")


class SoftTargetsSettings(DistillationSettings):
    """Knowledge distillation, arXiv:1503.02531: the teacher's class probabilities at a temperature."""

    objective = "soft_targets"
    teacher_labels: list[str] = Field(
        [], description="labelled images from which the teacher's classes are learned (default: the data's own labels)"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(4.0, description="T of both softmaxes")


SETTINGS: dict[str, type[TrainSettings]] = {
    settings.objective: settings
    for settings in (
        AutoencoderSettings, SkipAutoencoderSettings, MAESettings, SimCLRSettings, DINOSettings, SwAVSettings,
        DistillationSettings, SoftTargetsSettings,
    )
}  # fmt: skip
