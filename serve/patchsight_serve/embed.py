"""patchsight-embed: many images into one Parquet file of embeddings or into a gallery, here or through a server."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg, CliToggleFlag, SettingsConfigDict

from patchsight_serve.config import fail
from patchsight_serve.embedder_settings import EmbedderSettings, open_client, open_embedder, open_encoder
from patchsight_serve.errors import Conflict, PatchsightError

if TYPE_CHECKING:
    from patchsight_serve.filling import Target
    from patchsight_serve.skipped import Skipped

PROG = "patchsight-embed"


class EmbedSettings(EmbedderSettings):
    """Embed many images into Parquet (id, label, embedding), or into a gallery, to be searched. After any stop the same
    command goes on where it was. What cannot be read is left out and listed."""

    model_config = SettingsConfigDict(env_prefix="PATCHSIGHT_")
    table: ClassVar[str] = "embed"

    sources: CliPositionalArg[list[str]] = Field(
        description="folders, Parquet files, globs of images or of Parquet, image files, lists (*.txt, or - for stdin: "
        "a path in each line); labels are kept where there are any"
    )
    out: Path | None = Field(None, description="the Parquet file to write")
    gallery: str | None = Field(
        None, description="the gallery to fill: the server's, or one in --state-dir that no server has open"
    )
    state_dir: Path = Field(Path("state"), description="folder that holds the galleries, where there is no --server")
    keep_originals: bool = Field(True, description="keep the images in that gallery, for later encoders")
    skipped: Path | None = Field(
        None, description="the file that lists what was left out, and why (default: OUT.skipped.jsonl, or GALLERY's)"
    )
    ray: CliToggleFlag[bool] = Field(
        False, description="--out: by Ray Data, on the cluster at RAY_ADDRESS, else on all cores of this machine"
    )
    restart: CliToggleFlag[bool] = Field(False, description="--out: throw away what was done before a stop")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.out is None) == (self.gallery is None):
            raise ValueError("where to? --out FILE for Parquet, or --gallery NAME, one of them")
        if self.gallery is not None and self.ray:
            raise ValueError("--ray is for --out; a gallery takes images from one process")
        if self.gallery is not None and self.output != "recommended":
            raise ValueError(f"galleries hold the recommended embedding, not --output {self.output}")
        return self


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
    if settings.out is not None:
        to_file(settings, settings.out)
    elif settings.gallery is not None:
        to_gallery(settings, settings.gallery)


def to_file(settings: EmbedSettings, out: Path) -> None:
    """Into one Parquet file."""
    from patchsight_serve.bulk import BulkFile, embedding  # not before: `--help` must not wait for what does the work
    from patchsight_serve.sources import read_sources
    from patchsight_serve.terminal import progress_bar

    file = BulkFile(out, settings.skipped)
    if settings.restart:
        file.restart()
    dataset = read_sources(settings.sources)
    with open_embedder(settings) as embedder, progress_bar() as progress:
        task = progress.add_task("embed", total=len(dataset))
        if settings.ray:
            from patchsight_serve.ray_work import by_ray

            work = by_ray(dataset, settings, embedder)
        else:
            work = embedding(dataset, embedder)
        count, skipped = file.make(
            dataset, embedder.encoder, embedder.output, work, lambda n: progress.advance(task, n)
        )
    _tell(skipped, len(dataset))
    print(f"{out}: {count:,} embeddings of {embedder.encoder.name} ({embedder.output})")


def to_gallery(settings: EmbedSettings, name: str) -> None:
    """Into a gallery."""
    from patchsight_serve.errors import InvalidRequest
    from patchsight_serve.filling import fill
    from patchsight_serve.skipped import Skipped
    from patchsight_serve.sources import read_sources
    from patchsight_serve.terminal import progress_bar

    dataset = read_sources(settings.sources)
    with open_gallery(settings, name) as target, progress_bar() as progress:
        skipped = Skipped(settings.skipped or Path(f"{name}.skipped.jsonl"))
        task = progress.add_task("embed", total=len(dataset))
        filled = fill(dataset, target, skipped, lambda n: progress.advance(task, n))
    _tell(skipped, len(dataset))
    if skipped.count == len(dataset):
        raise InvalidRequest(f"none of {len(dataset)} images can be embedded; see {skipped.path}")
    print(f"gallery {name}: {filled.created:,} images are new, {filled.there:,} were there")


@contextmanager
def open_gallery(settings: EmbedSettings, name: str) -> Iterator["Target"]:
    """The gallery to fill. Raises as `open_embedder`; NotFound for a name that no gallery has; Conflict where another
    process has it open, or it is of another encoder."""
    if settings.server is not None:
        from patchsight_serve.filling import ServerGallery

        with open_client(settings, settings.server) as client:
            yield ServerGallery(client, name, settings.encoder)
        return
    from patchsight_serve.embedded_galleries import EmbeddedGalleries
    from patchsight_serve.own_gallery import OwnGallery

    with closing(EmbeddedGalleries(settings.state_dir / "galleries", settings.keep_originals)) as galleries:
        try:
            gallery = galleries.get(name, create=True)
        except Conflict as error:
            raise Conflict(f"{error.message}; if that is a server, name it: --server URL") from None
        bound = gallery.encoder
        encoder = open_encoder(settings, settings.encoder or (bound.name if bound else None))
        yield OwnGallery(gallery, encoder)


def _tell(skipped: "Skipped", images: int) -> None:
    if skipped.count:
        print(f"{skipped.count:,} of {images:,} images were left out: see {skipped.path}", file=sys.stderr)


if __name__ == "__main__":
    main()
