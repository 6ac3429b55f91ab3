"""What `patchsight-finetune` can be told. Imports no torch, so that `--help` answers at once."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_settings import CliSuppress

from patchsight_train.settings import CropScale, NonNegative, Positive, Share, TrainSettings

Blocks = Literal["all"] | float


class FineTuneSettings(TrainSettings):
    """Fine-tuning: an encoder and a linear classifier learn labelled images together, all of the encoder (as
    arXiv:2111.06377, appendix A.2), its last blocks (Figure 9), or none of it: the linear probe. The encoder is that of
    --init, a run folder or a bundle; with --scratch it starts from random weights."""

    table: ClassVar[str] = "finetune"
    objective = "finetune"

    test: list[str] = Field(min_length=1, description="labelled images that are classified once, at the end")
    val: list[str] = Field([], description="labelled images that are classified along the way")
    val_every: Annotated[int, Field(ge=0)] = Field(
        1, description="epochs between looks at --val, and between pictures; 0 for none (default: twenty times in all)"
    )
    scratch: bool = Field(
        False, description="random weights: what is pretraining worth? With --init, of the same architecture"
    )

    labels: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the labelled images that is used, of all classes alike, at least one of each"
    )
    blocks: Blocks = Field(
        "all", description="train only so many of the last blocks; 0.5: the last one's MLP; 0: the classifier alone"
    )
    pooling: Literal["cls", "mean"] | None = Field(None, description="what is classified (default: as in --init)")
    batch_norm: bool | None = Field(
        None, description="standardize the features, arXiv:2111.06377, A.1 (default: where blocks is 0)"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        0.75, description="each layer learns so much more slowly than the next; 1 for none (default for --scratch)"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="(default for blocks 0: 0)")
    mixup: NonNegative = Field(0.0, description="alpha of mixup, arXiv:1710.09412; 0 for none, 0.8 for long trainings")
    crop_scale: CropScale = Field((0.3, 1.0), description="least and largest share of the area")
    flip: Share = Field(0.5, description="probability of a mirrored view")
    color_strength: NonNegative = Field(0.0, description="s of SimCLR's color distortion; 0 for no color")

    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate of the last layer, at this batch")
    beta2: Share = 0.999

    # Of pretraining. The loop goes by `knn_every`, which is set to what `val_every` says.
    knn_every: CliSuppress[Annotated[int, Field(ge=0)]] = 0
    knn_test: CliSuppress[list[str]] = []
    knn_gallery: CliSuppress[Positive] = 10_000
    knn_queries: CliSuppress[Positive] = 2_000
    resident: CliSuppress[bool | None] = None

    @model_validator(mode="after")
    def blocks_are_whole(self) -> "FineTuneSettings":
        if self.blocks != "all" and (self.blocks < 0 or self.blocks not in (0.5, round(self.blocks))):
            raise ValueError(f"blocks {self.blocks:g} is neither all, nor 0.5, nor a whole number from 0 on")
        return self

    @model_validator(mode="after")
    def starts_somewhere(self) -> "FineTuneSettings":
        if self.init is None and not self.scratch:
            raise ValueError("an encoder is needed: --init RUN_OR_BUNDLE; or --scratch, for random weights")
        return self
