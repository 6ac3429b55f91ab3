"""Where the time of one request went."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Timing:
    """Seconds of wall clock in each stage of one request; stages of different images of it overlap.

    decode: from the bytes being there to the last image being decoded.
    queue: from entering the encoder's queue to the first image being in a batch.
    infer: from then until the last image was encoded.
    encode: writing the reply.
    images: how many the request brought.
    """

    decode: float = 0.0
    queue: float = 0.0
    infer: float = 0.0
    encode: float = 0.0
    images: int = 0

    @contextmanager
    def encoding(self, observe: Callable[[float], object]) -> Iterator[None]:
        """Take the time of the block as that of writing the reply; `observe` is told it, too."""
        start = time.perf_counter()
        yield
        self.encode = time.perf_counter() - start
        observe(self.encode)

    def server_timing(self) -> str:
        """The `Server-Timing` header's value; its unit is the millisecond."""
        return (
            f"decode;dur={1000 * self.decode:.3f}, queue;dur={1000 * self.queue:.3f}, "
            f"infer;dur={1000 * self.infer:.3f}, encode;dur={1000 * self.encode:.3f}"
        )
