"""The channels to a Triton, against a gRPC server that speaks its protocol and may go and come back."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from triton_process import free_port
from tritonclient.grpc import service_pb2, service_pb2_grpc

from patchsight_serve.triton_client import Triton, TritonFailure

CHANNELS = 4


class Answering(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers every inference with nothing, after a while: several calls are under way at once."""

    async def ModelInfer(self, request: Any, _: Any) -> Any:  # noqa: N802 - gRPC's name
        await asyncio.sleep(0.02)
        return service_pb2.ModelInferResponse(model_name=request.model_name)


async def started(port: int) -> Any:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Answering(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server


def with_triton(work: Callable[[Triton, Any, int], Awaitable[None]]) -> None:
    async def run() -> None:
        port = free_port()
        server = await started(port)
        async with Triton(f"grpc://127.0.0.1:{port}", CHANNELS) as triton:
            await work(triton, server, port)

    asyncio.run(run())


async def ask(triton: Triton, calls: int) -> None:
    await asyncio.gather(*(triton.infer("m", [], [], 5.0, 1) for _ in range(calls)))


def test_a_server_that_is_back_is_not_lost_again() -> None:
    """Channels come back one after the other: from the first that is there on, no call fails."""

    async def work(triton: Triton, server: Any, port: int) -> None:
        for _ in range(3):
            await ask(triton, 2 * CHANNELS)  # all are connected
        for _ in range(3):
            await server.stop(None)
            for _ in range(20):  # each notices at another time, and waits for as long as it likes
                with pytest.raises(TritonFailure):
                    await ask(triton, CHANNELS)
                await asyncio.sleep(0.05)
            server = await started(port)
            await answered(triton)
            for _ in range(40):
                await ask(triton, 2 * CHANNELS)
        await server.stop(None)

    with_triton(work)


async def answered(triton: Triton) -> None:
    """Ask until a call succeeds."""
    for _ in range(500):
        try:
            return await ask(triton, 1)
        except TritonFailure:
            await asyncio.sleep(0.02)
    raise AssertionError("the server is not found again")


@pytest.mark.parametrize(
    ("connected", "under_way", "chosen"),
    [
        ((0, 1, 1, 1), (0, 3, 1, 2), 2),  # the first is idle only because it fails at once
        ((1, 1, 1, 1), (1, 1, 0, 1), 2),
        ((0, 0, 0, 0), (1, 0, 1, 1), 1),
    ],
)
def test_the_least_busy_of_those_that_are_connected(
    connected: tuple[int, ...], under_way: tuple[int, ...], chosen: int
) -> None:
    states = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.READY)
    triton = Triton("grpc://127.0.0.1:1", CHANNELS)
    channels = [SimpleNamespace(get_state=lambda state=states[i], **_: state) for i in connected]
    triton._clients = [SimpleNamespace(_channel=channel) for channel in channels]
    triton._under_way = list(under_way)
    assert triton._least_busy() == chosen


def test_calls_are_spread_over_all_channels() -> None:
    async def work(triton: Triton, server: Any, _: int) -> None:
        deadline = asyncio.get_running_loop().time() + 10
        while asyncio.get_running_loop().time() < deadline:
            calls = [asyncio.ensure_future(ask(triton, 1)) for _ in range(2 * CHANNELS)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            spread = list(triton._under_way)
            await asyncio.gather(*calls)
            if spread == [2] * CHANNELS:
                break
        assert spread == [2] * CHANNELS
        await server.stop(None)

    with_triton(work)
