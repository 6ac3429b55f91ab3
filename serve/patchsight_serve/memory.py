"""What is known of the process' memory and nobody else can know: what will stay, and when much was freed."""

import contextlib
import ctypes
import gc

YOUNG = 10_000  # objects that were made and are not gone again, before Python looks for cycles among them

_AS_IT_WAS = gc.get_threshold()


def settle() -> None:
    """Look through all objects once, and let those that are there out of every later search for cycles. They stay as
    long as the server does; to search them took 60 ms each time, a few times a minute, and no request went on
    meanwhile. Objects that go by themselves are freed as before."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG)


def unsettle() -> None:
    """Undo `settle`, for a process that goes on without a server."""
    gc.unfreeze()
    gc.set_threshold(*_AS_IT_WAS)


def give_back() -> None:
    """Give memory that was freed back to the system; glibc would keep the pieces between what is in use."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
