"""How long an image takes an engine that is somewhere else, seen from here: what silence is judged by."""

import math
import time

MEMORY_S = 5.0  # of work; what is older fades


class Pace:
    """Seconds of work per image, by the answers while there is work: right for single images and for full batches, and
    whatever a request's own wait in the queue."""

    def __init__(self) -> None:
        self.in_flight = 0  # images that are away
        self._since = 0.0  # the last answer, or when the first image left
        self._seconds = 0.0
        self._images = 0.0

    def left(self, images: int) -> None:
        """So many images go out."""
        if not self.in_flight:
            self._since = time.perf_counter()
        self.in_flight += images

    def came(self, images: int, answered: bool) -> None:
        """They are back, with an answer or without."""
        now = time.perf_counter()
        if answered:
            passed = now - self._since
            fade = math.exp(-passed / MEMORY_S)  # by time: answers that come together count alike
            self._seconds = fade * self._seconds + passed
            self._images = fade * self._images + images
        self._since = now
        self.in_flight -= images

    @property
    def seconds_per_image(self) -> float | None:
        """None before the first answer."""
        return self._seconds / self._images if self._images else None
