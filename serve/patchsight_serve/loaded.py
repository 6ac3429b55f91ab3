"""An encoder with the engine that runs it: what a request takes once, at its beginning, and keeps to its end."""

from dataclasses import dataclass

from patchsight_serve.batcher import Batcher
from patchsight_serve.encoder import Encoder, RemoteEncoder, Runtime
from patchsight_serve.engine import Engine
from patchsight_serve.item import Identity
from patchsight_serve.manifest import Manifest
from patchsight_serve.metrics import Metrics
from patchsight_serve.settings import ServeSettings


@dataclass(frozen=True, eq=False)
class Loaded:
    """Whoever looked up the two apart could meet a reload between, and get one version's name on another's numbers."""

    encoder: Encoder | RemoteEncoder
    engine: Engine

    @property
    def manifest(self) -> Manifest:
        """As in `Described`."""
        return self.encoder.manifest

    @property
    def runtime(self) -> Runtime:
        """As in `Described`."""
        return self.encoder.runtime

    @property
    def identity(self) -> Identity:
        """What a gallery is bound to."""
        return Identity(self.manifest.name, self.manifest.sha256)


def with_engine(encoder: Encoder | RemoteEncoder, settings: ServeSettings, metrics: Metrics) -> Loaded:
    """The encoder with an engine that is not yet entered."""
    on_batch = metrics.batch_size.labels(encoder.manifest.name).observe
    if isinstance(encoder, RemoteEncoder):
        from patchsight_serve.triton_engine import TritonEngine  # only now: gRPC takes its time to load

        remote = TritonEngine(
            encoder, settings.max_queue, on_batch, settings.triton_channels, settings.triton_probe_s,
            settings.triton_shared_memory, settings.max_wait_s,
        )  # fmt: skip
        return Loaded(encoder, remote)
    batcher = Batcher(
        encoder, settings.batch, settings.max_queue, on_batch, settings.max_wait_s, settings.batch_timeout_s
    )
    return Loaded(encoder, batcher)
