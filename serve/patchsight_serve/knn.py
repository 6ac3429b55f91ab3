"""patchsight-knn: measure an encoder by DINO's k-NN protocol, in this process or through a server."""

import sys
from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator
from pydantic_settings import CliToggleFlag, SettingsConfigDict

from patchsight_serve.config import fail
from patchsight_serve.embedder_settings import EmbedderSettings
from patchsight_serve.errors import PatchsightError

PROG = "patchsight-knn"


class KnnSettings(EmbedderSettings):
    """Measure an encoder by its nearest neighbors: how many test images have the class that their neighbors among the
    training images, or a server's gallery, vote for. Sources are a Parquet file, a glob of them, or a folder with one
    subfolder per class; or Parquet that patchsight-embed or a gallery's export wrote, and no encoder is needed."""

    model_config = SettingsConfigDict(env_prefix="PATCHSIGHT_", cli_shortcuts={"as-json": "json"})
    table: ClassVar[str] = "knn"

    train: str | None = Field(None, description="labelled images whose classes are known: the gallery")
    gallery: str | None = Field(None, description="in place of --train: a labelled gallery of the --server")
    test: str = Field(description="labelled images to classify")
    skip_self: CliToggleFlag[bool] = Field(
        False, description="an image of the gallery with the query's name does not vote: for a set against itself"
    )
    shots: list[Annotated[int, Field(gt=0)]] = Field([], description="also with so few labelled images of each class")
    draws: Annotated[int, Field(gt=0)] = Field(5, description="how often these few are drawn")
    seed: int = Field(0, description="of the draws")
    as_json: CliToggleFlag[bool] = Field(False, description="print one JSON object instead of the table")

    @model_validator(mode="after")
    def _one_gallery(self) -> Self:
        if (self.train is None) == (self.gallery is None):
            raise ValueError("who votes? --train SOURCE, or --gallery NAME of a --server, one of them")
        if self.gallery is None:
            return self
        if self.server is None:
            raise ValueError(f"--gallery {self.gallery} needs --server URL; of an export, name the file: --train FILE")
        if self.skip_self or self.shots or self.output != "recommended":
            raise ValueError("--skip-self, --shots and --output are for --train: a gallery votes as it is")
        return self


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, embed both sources, evaluate, print. Exits with 2 on a wrong setting, 1 if the work fails."""
    settings = KnnSettings.from_command_line(PROG, sys.argv[1:] if argv is None else argv)
    from patchsight_serve.knn_report import run  # only now: `--help` must not wait for what does the work

    try:
        run(settings)
    except (PatchsightError, OSError) as error:
        fail(PROG, str(error), status=1)


if __name__ == "__main__":
    main()
