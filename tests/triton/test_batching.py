"""Triton makes the batches, of whatever requests there are; deadlines and cancellations reach it; memory is shared."""

import asyncio
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from patchsight_serve.encoder import RemoteEncoder
from patchsight_serve.errors import BundleError, DeadlineExceeded
from patchsight_serve.triton_client import TritonFailure
from patchsight_serve.triton_discovery import find_encoders
from patchsight_serve.triton_engine import TritonEngine

ENCODER = "simclr-vit-tiny-cifar10-long"


@pytest.fixture(scope="module")
def remote(triton: Any) -> RemoteEncoder:
    return find_encoders(triton.address, wait_s=5)[ENCODER]


@pytest.fixture(scope="module")
def pixels() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8))


@asynccontextmanager
async def engine(remote: RemoteEncoder, **options: Any) -> Any:
    async with TritonEngine(remote, **options) as engine:
        await engine.prove(0.0, 10.0)
        yield engine


def counts(triton: Any) -> tuple[int, int, int]:
    """Images, executions and cancelled requests of the encoder, as Triton counts them."""
    client = triton_grpc.InferenceServerClient(triton.address.removeprefix("grpc://"))
    (stats,) = client.get_inference_statistics(ENCODER).model_stats
    client.close()
    return stats.inference_count, stats.execution_count, stats.inference_stats.fail.count


def test_64_requests_at_once_are_few_executions(
    shared_serve: Callable[..., str], triton: Any, remote: RemoteEncoder, photos: list[bytes], pixels: list[np.ndarray]
) -> None:
    url = shared_serve("--triton", triton.address, "--no-sample-gallery", "--triton-probe-s", "30")

    async def ask() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client,
            engine(remote, probe_s=60) as other,
        ):
            one = {"params": {"encoder": ENCODER}}
            await asyncio.gather(*(client.post("/embed", content=photos[i], **one) for i in range(64)))  # connects
            before = counts(triton)
            # Triton is at work for somebody else: what comes meanwhile has to wait, however slow this machine decodes.
            busy = [asyncio.create_task(other.run(pixels, ["cls_embedding"])) for _ in range(3)]
            await asyncio.sleep(0.05)
            replies = await asyncio.gather(*(client.post("/embed", content=photos[i], **one) for i in range(64)))
            await asyncio.gather(*busy)
            after = counts(triton)
        images, executions = after[0] - before[0] - 3 * 64, after[1] - before[1] - 3
        assert images == 64
        assert executions <= 16
        return [reply.status_code for reply in replies]

    assert set(asyncio.run(ask())) == {200}


def test_shared_memory_changes_no_bit(remote: RemoteEncoder, pixels: list[np.ndarray]) -> None:
    """The first call, and the second one in the same slot with other pictures."""
    outputs = list(remote.manifest.outputs)

    async def run(memory: bool) -> list[dict[str, np.ndarray]]:
        async with engine(remote, memory=memory) as it:
            first, _ = await it.run(pixels, outputs)
            second, _ = await it.run(pixels[::-1], outputs)
            if memory:
                assert it._memory._count == 1
                assert len(it._memory._free) == 1
            return [*first, *second]

    over_grpc, over_memory = asyncio.run(run(False)), asyncio.run(run(True))
    for a, b in zip(over_grpc, over_memory, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in outputs)


def test_a_slot_whose_call_was_given_up_is_not_used_again(remote: RemoteEncoder, pixels: list[np.ndarray]) -> None:
    """Triton may still write into it: the next request's numbers would be wrong."""
    outputs = list(remote.manifest.outputs)

    async def run() -> None:
        async with engine(remote) as it:
            wanted, _ = await it.run(pixels[:32], outputs)
            (used,) = [slot.name for slot in it._memory._free]
            given_up = asyncio.create_task(it.run(pixels, outputs))
            await asyncio.sleep(0.05)
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            again, _ = await it.run(pixels[:32], outputs)
            assert used not in [slot.name for slot in it._memory._free]
            for a, b in zip(wanted, again, strict=True):
                assert all(np.array_equal(a[name], b[name]) for name in outputs)

    asyncio.run(run())


def test_deadline_and_cancellation_reach_triton(remote: RemoteEncoder, triton: Any, pixels: list[np.ndarray]) -> None:
    """Requests that wait behind others are given up; Triton never runs them."""

    async def run() -> tuple[int, int, int]:
        async with engine(remote, probe_s=60) as it:
            before = counts(triton)
            busy = [asyncio.create_task(it.run(pixels, ["cls_embedding"])) for _ in range(3)]
            await asyncio.sleep(0.05)  # one runs, two wait at Triton; a fourth channel is free
            given_up = [asyncio.create_task(it.run(pixels[:1], ["mean_embedding"])) for _ in range(5)]
            await asyncio.sleep(0.05)
            for task in given_up:
                task.cancel()
            with pytest.raises(DeadlineExceeded):
                async with it.admit(1, 0.1):
                    await it.run(pixels[:1], ["attention"])
            await asyncio.gather(*busy)
            await asyncio.sleep(0.5)
        after = counts(triton)
        return tuple(b - a for a, b in zip(before, after, strict=True))  # type: ignore[return-value]

    images, executions, failed = asyncio.run(run())
    assert images == 3 * 64
    assert executions == 3
    assert failed == 2  # of those given up, what was sent: one call, and then the one with the deadline


def test_a_server_of_somebody_else_is_refused() -> None:
    started = time.monotonic()
    with pytest.raises(BundleError, match=r"--triton grpc://127.0.0.1:9: Triton: .*onnect"):
        find_encoders("grpc://127.0.0.1:9", wait_s=1.0)
    assert time.monotonic() - started < 10


def test_an_unknown_model_is_said_to_be_unloaded(remote: RemoteEncoder, pixels: list[np.ndarray]) -> None:
    other = RemoteEncoder(remote.manifest.model_copy(update={"name": "nobody"}), remote.address)

    async def run() -> None:
        async with TritonEngine(other) as it:
            with pytest.raises(TritonFailure, match="nobody") as raised:
                await it.run(pixels[:1], ["cls_embedding"])
            assert raised.value.reason == "unloaded"

    asyncio.run(run())
