"""Clients that ask a gateway without end, and remember what they saw: for tests/triton and triton_gateway.py."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

CLIENTS = 16
LONGEST_S = 35.0  # of a request: the server's own limit is 30
HEALED_S = 10.0


@dataclass
class Seen:
    """What clients saw, by the clock: replies `(sent, took, status)`, and what /readyz said `(answered, status)`."""

    replies: list[tuple[float, float, int]] = field(default_factory=list)
    ready: list[tuple[float, int]] = field(default_factory=list)
    wrong: int = 0

    def unready(self) -> float:
        """When /readyz first said no."""
        return min(at for at, status in self.ready if status != 200)

    def ready_again(self) -> float:
        """When it first said yes for good."""
        return min((at for at, _ in self.ready if at > max(t for t, status in self.ready if status != 200)))


async def load(client: httpx.AsyncClient, photos: list[bytes], wanted: np.ndarray, seen: Seen, first: int) -> None:
    """One client, until cancelled."""
    i = first
    while True:
        i = (i + 1) % len(photos)
        sent = time.monotonic()
        reply = await client.post("/embed", params={"normalize": "false"}, content=photos[i])
        seen.replies.append((sent, time.monotonic() - sent, reply.status_code))
        if reply.status_code == 200:
            values = np.array(reply.json()["results"][0]["embedding"])
            seen.wrong += bool(np.abs(values - wanted[i]).max() > 1e-5 * np.abs(wanted[i]).max())
        else:
            await asyncio.sleep(0.05)


async def watch(client: httpx.AsyncClient, seen: Seen) -> None:
    while True:
        reply = await client.get("/readyz")
        seen.ready.append((time.monotonic(), reply.status_code))
        await asyncio.sleep(0.05)


async def under_load(
    url: str, photos: list[bytes], harm: Callable[[], Coroutine[Any, Any, float]]
) -> tuple[Seen, float]:
    """What was seen while `harm` was done, and the time it says it happened; ends once the gateway is well again."""
    seen = Seen()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=LONGEST_S, limits=limits) as client:
        replies = [await client.post("/embed", params={"normalize": "false"}, content=photo) for photo in photos]
        wanted = np.array([reply.json()["results"][0]["embedding"] for reply in replies])
        tasks = [asyncio.create_task(load(client, photos, wanted, seen, first)) for first in range(CLIENTS)]
        tasks.append(asyncio.create_task(watch(client, seen)))
        await asyncio.sleep(1.5)
        harmed = await harm()
        ends = time.monotonic() + HEALED_S + 15
        while time.monotonic() < ends:
            await asyncio.sleep(0.2)
            states = [status for at, status in seen.ready if at > harmed]
            if 503 in states and states[-1] == 200:
                break
        await asyncio.sleep(1.0)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    broken = [e for e in ended if isinstance(e, Exception) and not isinstance(e, asyncio.CancelledError)]
    assert not broken, broken  # a connection that was reset, or a request that hung
    return seen, harmed
