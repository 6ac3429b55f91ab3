"""What lives as long as the server is left out of the search for cycles, and nothing is lost by it."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from patchsight_serve import memory


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    memory.unsettle()  # a test of another file may have exchanged encoders without a server that ends
    thresholds = gc.get_threshold()
    yield
    memory.unsettle()
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, thresholds)


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_what_is_there_is_not_looked_through_again() -> None:
    kept = [Cycle() for _ in range(100)]
    before = len(gc.get_objects())
    memory.settle()
    assert len(gc.get_objects()) < before / 10
    assert gc.get_freeze_count() > 100
    assert gc.get_threshold()[0] == memory.YOUNG
    assert kept


def test_a_replaced_encoder_goes_although_it_was_there_at_the_start() -> None:
    """It may be part of a cycle, which nobody would ever look at again without a second `settle`."""
    encoder = Cycle()
    gone = weakref.ref(encoder)
    memory.settle()
    del encoder
    gc.collect()
    assert gone() is not None
    memory.settle()
    assert gone() is None
