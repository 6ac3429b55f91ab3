"""patchsight-embed: images to one Parquet file of embeddings, in this process or through a server."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import CliPositionalArg, CliToggleFlag, SettingsConfigDict

from patchsight_serve.config import fail
from patchsight_serve.embedder_settings import EmbedderSettings, open_embedder
from patchsight_serve.errors import PatchsightError

PROG = "patchsight-embed"


class EmbedSettings(EmbedderSettings):
    """Embed many images into Parquet: id, label, embedding. After any stop the same command goes on where it was. What
    cannot be read is left out and listed."""

    model_config = SettingsConfigDict(env_prefix="PATCHSIGHT_")
    table: ClassVar[str] = "embed"

    sources: CliPositionalArg[list[str]] = Field(
        description="folders, Parquet files, globs of images or of Parquet, image files, lists (*.txt, or - for stdin: "
        "a path in each line); labels are kept where there are any"
    )
    out: Path = Field(description="the Parquet file to write")
    skipped: Path | None = Field(
        None, description="the file that lists what was left out, and why (default: OUT.skipped.jsonl)"
    )
    restart: CliToggleFlag[bool] = Field(False, description="throw away what was done before a stop")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, embed, say what was written. Exits with 2 on a wrong setting, 1 if the work fails, 130 on Ctrl-C."""
    settings = EmbedSettings.from_command_line(PROG, sys.argv[1:] if argv is None else argv)
    try:
        run(settings)
    except (PatchsightError, OSError) as error:
        fail(PROG, str(error), status=1)
    except KeyboardInterrupt:
        fail(PROG, "stopped; the same command goes on from here", status=130)


def run(settings: EmbedSettings) -> None:
    """Raises PatchsightError, OSError; what is done stays done."""
    from patchsight_serve.bulk import BulkFile, embedding  # not before: `--help` must not wait for what does the work
    from patchsight_serve.sources import read_sources
    from patchsight_serve.terminal import progress_bar

    file = BulkFile(settings.out, settings.skipped)
    if settings.restart:
        file.restart()
    dataset = read_sources(settings.sources)
    with open_embedder(settings) as embedder, progress_bar() as progress:
        task = progress.add_task("embed", total=len(dataset))
        count, skipped = file.make(
            dataset, embedder.encoder, embedder.output, embedding(dataset, embedder),
            lambda n: progress.advance(task, n),
        )  # fmt: skip
    if skipped.count:
        print(f"{skipped.count:,} of {len(dataset):,} images were left out: see {skipped.path}", file=sys.stderr)
    print(f"{settings.out}: {count:,} embeddings of {embedder.encoder.name} ({embedder.output})")


if __name__ == "__main__":
    main()
