"""Triton's processes are killed under load: readiness goes at once, no wrong answer is given, nothing hangs, and the
gateway comes back by itself."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from measure import ROOT
from triton_clients import HEALED_S, Seen, under_load

ENCODER = "dino-vit-cifar10"  # the quickest that ships
UNREADY_S = 2.0


def judge(seen: Seen, harmed: float, healed_from: float) -> None:
    """What must hold, whatever was killed."""
    assert seen.wrong == 0
    codes = Counter(status for _, _, status in seen.replies)
    assert set(codes) <= {200, 503, 504}, codes
    assert codes[503] + codes[504] > 0, "nobody noticed: was anything killed?"
    assert seen.unready() - harmed < UNREADY_S
    assert seen.ready_again() - healed_from < HEALED_S
    last = [status for sent, _, status in seen.replies if sent > seen.ready_again() + 0.2]
    assert last
    assert set(last) == {200}


@pytest.fixture
def gateway(serve: Callable[..., str], start_triton: Callable[..., Any]) -> tuple[str, Any]:
    """A Triton that may be harmed, and the gateway in front of it."""
    triton = start_triton(ROOT / "model_repository" / ENCODER)
    return serve("--triton", triton.address, "--no-sample-gallery"), triton


def test_a_killed_worker_is_noticed_and_replaced(gateway: tuple[str, Any], photos: list[bytes]) -> None:
    """Triton goes on saying that it is ready; every inference would fail for ever."""
    url, triton = gateway

    async def harm() -> float:
        triton.kill_worker(ENCODER)
        return time.monotonic()

    seen, harmed = asyncio.run(under_load(url, photos[:16], harm))
    judge(seen, harmed, healed_from=harmed)


@pytest.mark.acceptance
@pytest.mark.timeout(900)
def test_ten_workers_in_a_row(gateway: tuple[str, Any], photos: list[bytes]) -> None:
    url, triton = gateway

    async def harm() -> float:
        triton.kill_worker(ENCODER)
        return time.monotonic()

    for _ in range(10):
        seen, harmed = asyncio.run(under_load(url, photos[:16], harm))
        judge(seen, harmed, healed_from=harmed)


def test_a_killed_server_is_noticed_and_found_again(gateway: tuple[str, Any], photos: list[bytes]) -> None:
    url, triton = gateway
    restarted = 0.0

    async def harm() -> float:
        nonlocal restarted
        await asyncio.to_thread(triton.kill)
        harmed = time.monotonic()
        await asyncio.sleep(2.5)  # so that the gateway meets nobody
        await asyncio.to_thread(triton.start)
        restarted = time.monotonic()
        return harmed

    seen, harmed = asyncio.run(under_load(url, photos[:16], harm))
    judge(seen, harmed, healed_from=restarted)
    large = httpx.post(  # over shared memory, which the new server knows nothing of yet
        f"{url}/embed", params={"outputs": "patch_tokens"}, timeout=60,
        files=[("images", (f"{i}", photo)) for i, photo in enumerate(photos[:64])],
    )  # fmt: skip
    assert large.status_code == 200
