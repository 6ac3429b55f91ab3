"""Where the time of one request went."""

from dataclasses import dataclass


@dataclass
class Timing:
    """Seconds of wall clock in each stage of one request; stages of different images of it overlap.

    decode: from the bytes being there to the last image being decoded.
    queue: from entering the encoder's queue to the first image being in a batch.
    infer: from then until the last image was encoded.
    """

    decode: float = 0.0
    queue: float = 0.0
    infer: float = 0.0

    def server_timing(self) -> str:
        """The `Server-Timing` header's value; its unit is the millisecond."""
        return ", ".join(f"{stage};dur={1000 * seconds:.3f}" for stage, seconds in vars(self).items())
