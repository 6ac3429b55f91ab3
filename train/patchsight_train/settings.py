"""What every training run can be told; `objective_settings.py` adds what each objective has of its own.

Imports no torch, so that `--help` answers at once.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import SettingsConfigDict

from patchsight_serve.config import CommandSettings
from patchsight_train.architecture import CHOICES, Backbone, EncoderConfig, ViTConfig, architecture

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


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
    init: Path | None = Field(None, description="start from the encoder of this bundle or run folder")

    backbone: Backbone = Field("vit-tiny", description="vit-tiny, vit-small, vit-base, resnet18 or resnet50")
    image_size: Positive = Field(32, description="pixels of a global view (default: by the data and the device)")
    patch_size: Positive = Field(4, description="pixels; divides image_size (default: by image_size and the device)")
    width: Positive | None = Field(None, description="D of the ViT (default: the backbone's)")
    depth: Positive | None = Field(None, description="blocks of the ViT (default: the backbone's)")
    heads: Positive | None = Field(None, description="divides width (default: the backbone's)")
    mlp_ratio: Annotated[float, Field(gt=0)] = Field(4.0, description="width of a block's MLP, over that of its tokens")
    registers: Annotated[int, Field(ge=0)] = Field(0, description="further tokens without a patch, arXiv:2309.16588")
    stem: Literal["patch", "conv", "cifar", "imagenet"] | None = Field(
        None, description="conv: a small convolutional stem for ViTs, not for MAE; cifar, imagenet: of ResNets"
    )
    stored_size: Positive | None = Field(None, description="pixels of the kept pictures, from which views are cut")

    epochs: Positive = Field(
        100, description="times that all images are seen (default: by the number of images and the device)"
    )
    batch_size: Annotated[int, Field(ge=2)] = Field(
        512, description="images a step, over all ranks (default: by the number of images and the device)"
    )
    micro_batch: Positive | None = Field(
        None, description="images a forward: less memory, the same numbers (but for batch norm's)"
    )
    recompute: bool = Field(False, description="activation checkpointing of ViTs: less memory, a third more work")
    compile: bool = Field(False, description="torch.compile the encoder's blocks (default: on a GPU with a C compiler)")
    resident: bool | None = Field(None, description="keep all pictures decoded in memory (default: where they fit)")
    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate of AdamW at this batch size")
    final_lr: NonNegative = Field(1e-6, description="learning rate at the end; cosine to this")
    warmup_epochs: NonNegative = Field(10, description="epochs in which the learning rate rises to its peak")
    weight_decay: NonNegative = Field(0.05, description="of AdamW; not of biases, norms and single tokens")
    final_weight_decay: NonNegative | None = Field(None, description="cosine to this, if set")
    beta2: Share = Field(0.95, description="of AdamW: how slowly it forgets the size of gradients")
    clip_grad: NonNegative = Field(3.0, description="largest gradient norm; 0 for none")

    seed: int = Field(0, description="of all that is random: first weights, order, views")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU, where there is one")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device has it")
    threads: Positive | None = Field(None, description="CPU threads (default: torch's own choice)")
    checkpoint_every: Positive = Field(500, description="steps; the last two checkpoints are kept")
    tensorboard: bool = Field(False, description="write TensorBoard events beside metrics.jsonl")
    on_collapse: Literal["warn", "stop"] = Field("warn", description="what to do when the run shows a sign of collapse")
    knn_test: list[str] = Field([], description="labelled images to judge by; else a tenth of the labelled data")
    knn_every: Annotated[int, Field(ge=0)] = Field(5, description="epochs between evaluations; 0 for none")
    knn_gallery: Positive = Field(10_000, description="at most so many labelled images as gallery")
    knn_queries: Positive = Field(2_000, description="at most so many as queries")

    @property
    def pixels_kept(self) -> int:
        """Side of the squares at which pictures are kept."""
        return self.stored_size or self.image_size

    @property
    def architecture(self) -> EncoderConfig:
        """The encoder that these settings describe. Raises ValueError where its numbers do not fit together."""
        return architecture({name: getattr(self, name) for name in CHOICES})

    @model_validator(mode="after")
    def sizes_fit(self) -> "TrainSettings":
        _ = self.architecture
        if self.stored_size is not None and self.stored_size < self.image_size:
            raise ValueError(f"stored_size {self.stored_size} is less than image_size {self.image_size}")
        return self


class ViTOnly(TrainSettings):
    """Settings of objectives that need patches as tokens."""

    @model_validator(mode="after")
    def is_vit(self) -> "ViTOnly":
        if not isinstance(self.architecture, ViTConfig):
            raise ValueError(f"{self.objective} needs a Vision Transformer, not {self.backbone}")
        return self


class MultiCrop(TrainSettings):
    """Settings of objectives that see two global views and some local ones, arXiv:2006.09882 section 3.2."""

    local_crops: Annotated[int, Field(ge=0)] = Field(6, description="local views of each image; 0 for none")
    local_size: Positive | None = Field(None, description="pixels (default: half of image_size, in whole patches)")
    crop_scale: CropScale = Field((0.4, 1.0), description="least and largest share of the area, global views")
    local_scale: CropScale = Field((0.05, 0.4), description="the same, local views")

    @property
    def local_pixels(self) -> int:
        """Pixels along a local view."""
        step = self.patch_size if self.backbone.startswith("vit-") else 1
        return self.local_size or max(round(self.image_size / 2 / step), 1) * step

    @model_validator(mode="after")
    def local_fits(self) -> "MultiCrop":
        if self.backbone.startswith("vit-") and self.local_pixels % self.patch_size:
            raise ValueError(f"local_size {self.local_size} is not a multiple of patch_size {self.patch_size}")
        return self
