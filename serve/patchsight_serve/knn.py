"""patchsight-knn: measure an encoder by DINO's k-NN protocol, in this process or through a server."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, SecretStr
from pydantic_settings import CliToggleFlag, SettingsConfigDict

from patchsight_serve.config import CommandSettings, fail
from patchsight_serve.errors import PatchsightError
from patchsight_serve.manifest import default_repository

PROG = "patchsight-knn"


class KnnSettings(CommandSettings):
    """Measure an encoder by its nearest neighbors: how many test images have the class that their neighbors among the
    training images vote for. Sources are a Parquet file, a glob of them, or a folder with one subfolder per class."""

    model_config = SettingsConfigDict(env_prefix="PATCHSIGHT_", cli_shortcuts={"as-json": "json"})
    table: ClassVar[str] = "knn"

    train: str = Field(description="labelled images whose classes are known: the gallery")
    test: str = Field(description="labelled images to classify")
    encoder: str | None = Field(None, description="name of the encoder (default: the server's, or the first by name)")
    output: Literal["recommended", "cls", "mean"] = Field("recommended", description="which embedding of the encoder")
    model_repository: Path = Field(
        default_factory=default_repository, description="folder with one encoder bundle per subfolder"
    )
    server: str | None = Field(None, description="URL of a running server, which embeds in place of this process")
    api_key: SecretStr | None = Field(None, description="the server's API key")
    as_json: CliToggleFlag[bool] = Field(False, description="print one JSON object instead of the table")


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
