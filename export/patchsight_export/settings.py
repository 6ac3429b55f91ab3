"""What `patchsight-export` can be told. Imports no torch, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import CliPositionalArg, CliToggleFlag, SettingsConfigDict

from patchsight_serve.config import CommandSettings, number


class ExportSettings(CommandSettings):
    """Make an encoder bundle of a run folder or a public encoder: export to ONNX, compare with torch, publish; or add a
    measurement."""

    model_config = SettingsConfigDict(env_prefix="PATCHSIGHT_EXPORT_")
    table: ClassVar[str] = "export"

    source: CliPositionalArg[Path] = Field(
        description="run folder of patchsight-train; a bundle, for --precision; timm:NAME, a model of timm; a "
        "checkpoint file (.pth, .ckpt, .safetensors) of DINO, MAE, DINOv2, SimCLR, lightly, …; or a file *.json that "
        "patchsight-knn printed"
    )
    bundle: CliPositionalArg[Path] = Field(
        description="MODEL_REPOSITORY/NAME: the bundle to make, or the one that was measured"
    )
    whiten: str | None = Field(
        None, description="images, a folder or Parquet, without need of labels, that embeddings are whitened by"
    )
    recommend: Literal["cls", "mean", "both"] | None = Field(
        None,
        description="embedding to recommend; both: CLS and mean side by side, the best one where whitened "
        "(default: the objective's)",
    )
    weights: Literal["fp32", "fp16"] = Field(
        "fp32", description="as stored in the file; fp16 halves it, computed is in fp32 all the same"
    )
    precision: Literal["fp32", "fp16", "bf16", "int8"] = Field(
        "fp32",
        description="what the graph computes in, its products at least; int8 needs --calibrate",
    )
    calibrate: str | None = Field(
        None,
        description="--precision: images like those to come, a folder or Parquet; int8's ranges are learned from some, "
        "the result is judged on the others, by k-NN too where they have labels",
    )
    step: Annotated[int, Field(ge=1)] | None = Field(None, description="checkpoint to export (default: the newest)")
    opset: Annotated[Literal[18, 23], BeforeValidator(number)] = Field(
        23, description="of ONNX; 18 for runtimes that have no Attention operator yet"
    )

    dynamic_size: CliToggleFlag[bool] = Field(
        False, description="a graph that takes pictures of other sizes, too: any multiples of the patch size"
    )
    scaled_decode: CliToggleFlag[bool] = Field(
        False,
        description="large JPEGs are decoded at a part of their size wherever this encoder is used: several times as "
        "fast, and its numbers move a little",
    )
    attention: Literal["last", "rollout"] | int = Field(
        "last",
        description="which is served: of the last block; the rollout over all of them, one head; or of a BLOCK, by its "
        "number from 1, or from the end from -1",
    )

    image_size: Annotated[int, Field(gt=0)] | None = Field(
        None, description="public encoders: pixels, positions are interpolated (default: its own, 224 at most)"
    )
    checkpoint: Path | None = Field(None, description="timm:NAME: a file of its weights, in place of the hub's")
    prefix: str | None = Field(None, description="checkpoint file: where the encoder is in it, if it does not tell")
    heads: Annotated[int, Field(gt=0)] | None = Field(
        None, description="checkpoint file of a ViT: attention heads (default: 64 numbers each)"
    )
    normalize: Literal["imagenet", "half", "none"] = Field(
        "imagenet",
        description="checkpoint file: what its pixels went through: ImageNet's mean and deviation; to -1..1; to 0..1",
    )
    objective: str = Field("unstated", description="public encoders: how it was trained, for the manifest")
    dataset: str = Field("", description="public encoders: what it was trained on, for the manifest")
    license: str = Field("", description="public encoders: terms of the weights (default: what timm knows)")
