"""What `gallery_arm.py` asks of each contender, and what all of them are given alike.

Needs numpy alone: each contender runs in an environment of its own.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

DIM, K = 384, 10
BATCH = 1000  # vectors added at once
SHARES = {"50 %": 2, "1 %": 100, "0.01 %": 10_000}  # a filter lets through one row in so many
TIERS = len(SHARES)  # the numbers by which filters choose are 0 to TIERS

# Of the graphs (HNSW), for all that build one: the defaults of usearch. Links per node; candidates while building.
LINKS, CANDIDATES = 16, 128
WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000)  # candidates of a search; pgvector's limit: 1000

F32 = np.ndarray[Any, np.dtype[np.float32]]
I64 = np.ndarray[Any, np.dtype[np.int64]]
Search = Callable[[F32], Any]  # a query `(DIM,)` to the keys of the K nearest, best first; fewer where fewer are found


def tiers(rows: I64) -> I64:
    """For each row the rarest share that it is in: a filter for a share is `tier <= tier_of(share)`."""
    found = np.full(len(rows), TIERS, np.int64)
    for share, every in SHARES.items():  # from the most common to the rarest
        found[rows % every == 0] = tier_of(share)
    return found


def tier_of(share: str) -> int:
    """0 for the rarest."""
    return TIERS - 1 - list(SHARES).index(share)


class Contender(Protocol):
    """A store of vectors that is open. Vectors are unit rows float32 `(N, DIM)`, keys int64 `(N,)`.

    kept: what is safe once `add` returns. efforts: of a search, least first. filters: by name; the first is shown
    first. writes: may be added to while others search.
    """

    kept: str
    efforts: tuple[int, ...]
    filters: tuple[str, ...]
    writes: bool

    def __init__(self, folder: Path, count: int) -> None:
        """Open what is in the folder, or begin it. count: of vectors that are there, or will be."""

    def version(self) -> str:
        """Of what does the work."""

    def add(self, keys: I64, vectors: F32, tiers: I64) -> None:
        """Add vectors under new keys."""

    def finish(self) -> None:
        """After the last `add` of a filling: make the index, and have all on the disk; then there is only `close`."""

    def settle(self) -> None:
        """Return when searches are as fast as they will be."""

    def client(self, effort: int, tier: int | None, by: str) -> AbstractContextManager[Search]:
        """For one thread. tier: find only vectors of this tier or a lower one. by: one of `filters`."""

    def pids(self) -> list[int]:
        """Processes whose trees do the work."""

    def close(self) -> None:
        """Let go of everything."""


class InProcess:
    """What most of them have in common."""

    writes = True
    filters: tuple[str, ...] = ("filter",)

    def pids(self) -> list[int]:
        return [os.getpid()]

    def settle(self) -> None:
        pass
