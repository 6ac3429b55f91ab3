"""patchsight-embed: images to one Parquet file of embeddings, in this process or through a server."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from patchsight_serve.config import fail
from patchsight_serve.embedder_settings import EmbedderSettings, open_embedder
from patchsight_serve.errors import InvalidRequest, PatchsightError

PROG = "patchsight-embed"


class EmbedSettings(EmbedderSettings):
    """Embed every image of a folder, a Parquet file, or a glob of them, into Parquet: id, label, embedding. What cannot
    be read is left out and listed."""

    model_config = SettingsConfigDict(env_prefix="PATCHSIGHT_")
    table: ClassVar[str] = "embed"

    data: str = Field(description="the images; labels are kept where there are any")
    out: Path = Field(description="the Parquet file to write")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, embed, say what was written. Exits with 2 on a wrong setting, 1 if the work fails."""
    settings = EmbedSettings.from_command_line(PROG, sys.argv[1:] if argv is None else argv)
    try:
        run(settings)
    except (PatchsightError, OSError) as error:
        fail(PROG, str(error), status=1)


def run(settings: EmbedSettings) -> None:
    """Raises PatchsightError; then no file is left. InvalidRequest where no image can be read."""
    import numpy as np  # not before: `--help` must not wait for what does the work
    from rich.console import Console

    from patchsight_serve.dataset import read_dataset
    from patchsight_serve.embedder import embed_dataset
    from patchsight_serve.embedding_file import written
    from patchsight_serve.terminal import progress_bar

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    dataset, skipped = read_dataset(settings.data), []
    with (
        open_embedder(settings) as embedder,
        written(settings.out, dataset.class_names, embedder.encoder, embedder.output) as file,
        progress_bar() as progress,
    ):
        task = progress.add_task("embed", total=len(dataset))
        for i, result in enumerate(embed_dataset(dataset, embedder)):
            label = None if dataset.labels is None or dataset.labels[i] < 0 else int(dataset.labels[i])
            if isinstance(result, PatchsightError):
                skipped.append(f"{dataset.names[i]}: {result.message}")
            elif not np.isfinite(result).all():
                skipped.append(f"{dataset.names[i]}: its embedding holds NaN or infinity")
            else:
                file.add(dataset.names[i], label, result)
            progress.advance(task)
        if not file.count:
            raise InvalidRequest(f"none of {len(dataset)} images can be embedded; {skipped[0]}")
    for line in skipped:
        console.print(f"skipped {line}", markup=False)
    print(f"{settings.out}: {file.count:,} embeddings of {embedder.encoder.name} ({embedder.output})")


if __name__ == "__main__":
    main()
