"""What `patchsight-eval` can be told. Imports no torch, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_settings import CliToggleFlag, SettingsConfigDict

from patchsight_serve.config import CommandSettings

Positive = Annotated[int, Field(gt=0)]


class EvalSettings(CommandSettings):
    """Judge encoders on labelled images: k-NN, linear probe, what their embeddings are like, what disturbs them, as
    result.json and report.html. Sources are a Parquet file, a glob of them, or a folder with one subfolder per class;
    or, without --source, Parquet that patchsight-embed wrote."""

    model_config = SettingsConfigDict(env_prefix="PATCHSIGHT_TRAIN_")
    table: ClassVar[str] = "eval"

    source: list[Path] = Field([], description="run folder, or bundle of a ViT; repeat to compare several")
    train: str = Field(
        description="labelled images whose classes are known: gallery, and what the linear heads learn from"
    )
    test: str = Field(description="labelled images to classify")
    out: Path = Field(Path("eval"), description="folder for result.json, report.html and pictures/")
    train_images: str | None = Field(None, description="the pictures behind embeddings of --train, matched by name")
    test_images: str | None = Field(None, description="the same for --test")
    limit_train: Positive | None = Field(None, description="use only the first images of --train")
    limit_test: Positive | None = Field(None, description="use only the first images of --test")
    skip_self: CliToggleFlag[bool] = Field(
        False, description="an image of the gallery with the query's name does not vote: for a set against itself"
    )
    shots: list[Positive] = Field([1, 5, 10], description="k-NN also with so few labelled images of each class")
    draws: Positive = Field(5, description="how often these few are drawn")
    seed: int = Field(0, description="of the draws, and of noise")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU, where there is one")
    threads: Positive | None = Field(None, description="CPU threads (default: torch's own choice)")

    @model_validator(mode="after")
    def _pictures_belong_to_embeddings(self) -> "EvalSettings":
        if self.source and (self.train_images or self.test_images):
            raise ValueError(
                "train_images and test_images are for embeddings; with a source, --train and --test are images"
            )
        names = [source.resolve().name for source in self.source]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"two sources are called {twice!r}: the report could not tell them apart")
        return self
