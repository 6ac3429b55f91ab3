"""Which encoder turns images into embeddings, and where it runs: what the commands that embed have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, SecretStr

from patchsight_serve.config import CommandSettings
from patchsight_serve.errors import NotFound
from patchsight_serve.manifest import default_repository

if TYPE_CHECKING:
    from patchsight_serve.client import Client
    from patchsight_serve.embedder import Embedder
    from patchsight_serve.encoder import Encoder

OUTAGE_S = 120.0  # that bulk work waits for a server which is not there: long enough to start it again


class EmbedderSettings(CommandSettings):
    encoder: str | None = Field(
        None, description="name of the encoder (default: the server's, or the one that sees the largest pictures)"
    )
    output: Literal["recommended", "cls", "mean", "both"] = Field(
        "recommended", description="which embedding of the encoder"
    )
    model_repository: Path = Field(
        default_factory=default_repository, description="folder with one encoder bundle per subfolder"
    )
    server: str | None = Field(None, description="URL of a running server, which embeds in place of this process")
    api_key: SecretStr | None = Field(None, description="the server's API key")


@contextmanager
def open_embedder(settings: EmbedderSettings, threads: int | None = None) -> Iterator["Embedder"]:
    """The server, or an encoder in this process with so many threads (None: one per core).

    Raises:
        NotFound: there is no such encoder. InvalidRequest: it has no such output, or `server` is no URL.
        PatchsightError: the server cannot be reached.
    """
    if settings.server is not None:
        with open_client(settings, settings.server) as client:
            yield client
        return
    from patchsight_serve.embedder import LocalEmbedder

    yield LocalEmbedder(open_encoder(settings, settings.encoder, threads), settings.output, threads=threads)


def open_client(settings: EmbedderSettings, server: str) -> "Client":
    """The server. Once it was there it is waited for while it is busy or starts again. Raises as `open_embedder`."""
    from patchsight_serve.client import Client

    key = settings.api_key.get_secret_value() if settings.api_key else None
    return Client(server, key, encoder=settings.encoder, output=settings.output, outage_s=OUTAGE_S)


def open_encoder(settings: EmbedderSettings, name: str | None, threads: int | None = None) -> "Encoder":
    """An encoder in this process; None: the default one. Raises NotFound, BundleError."""
    from patchsight_serve import repository  # ONNX Runtime: not needed where a server does the work
    from patchsight_serve.encoder import default_name

    if name is None:
        encoders = repository.load_encoders(settings.model_repository, threads)
        return encoders[default_name(encoders)]
    bundles = {bundle.name: bundle for bundle in repository.needed_bundles(settings.model_repository)}
    if name not in bundles:
        message = f"--encoder {name!r} is not in {settings.model_repository}; there are {', '.join(bundles)}"
        raise NotFound(message, "encoder")
    return repository.load_encoder(bundles[name], threads)
