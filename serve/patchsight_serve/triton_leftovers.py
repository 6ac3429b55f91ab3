"""Shared memory that a gateway left behind when it was killed, here and at Triton, given back by whoever comes next.

A gateway holds each of its regions locked: the number of a process says nothing where containers share their memory.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from patchsight_serve.errors import PatchsightError
from patchsight_serve.lock import locked
from patchsight_serve.triton_client import CALL_S, Triton, said

MEMORY = Path("/dev/shm")
PREFIX = "patchsight-"
YOUNG_S = 10.0  # a region is there for a moment before it is locked


def hold(name: str) -> int:
    """Lock one's own region: a descriptor, to be closed when the region is gone. Raises OSError."""
    lock = locked(MEMORY / name)
    if lock is None:
        raise OSError(f"{MEMORY / name} cannot be locked")
    return lock


def left_behind() -> Iterator[str]:
    """The names of regions that nobody holds any more."""
    for path in MEMORY.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is just gone
            if time.time() - path.stat().st_mtime >= YOUNG_S and (lock := locked(path)) is not None:
                os.close(lock)
                yield path.name


async def sweep(triton: Triton) -> None:
    """Have Triton forget them, and give their memory back, once those of a gateway that has just died are no longer
    young. What Triton never knew, or a Triton that is gone, is no hindrance."""
    await asyncio.sleep(YOUNG_S)
    for name in left_behind():
        with suppress(PatchsightError):
            await said(triton.client.unregister_system_shared_memory(name, client_timeout=CALL_S))
        with suppress(OSError):
            (MEMORY / name).unlink()
