"""A Triton server over gRPC: a pool of channels, what it serves, and its failures in our words."""

from collections.abc import Awaitable, Sequence
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from grpc import ChannelConnectivity
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient, InferResult
from tritonclient.utils import InferenceServerException

from patchsight_serve.errors import DeadlineExceeded, NotReady, Overloaded, PatchsightError
from patchsight_serve.manifest import Manifest
from patchsight_serve.triton_config import manifest_of

MESSAGE_LIMIT = 2**31 - 1  # bytes; gRPC's own is 4 MiB, less than a batch of patch tokens
OPTIONS = [
    ("grpc.max_send_message_length", MESSAGE_LIMIT),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.use_local_subchannel_pool", 1),  # otherwise all channels to one address share one connection
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # which is also how long an attempt may take
    ("grpc.max_reconnect_backoff_ms", 1000),  # gRPC's own is two minutes
    ("grpc.keepalive_time_ms", 10_000),  # finds out about a host that is gone without a word
    ("grpc.keepalive_timeout_ms", 5000),
]
CALL_S = 5.0  # for what is no inference
T = TypeVar("T")
Reason = Literal["unreachable", "unloaded", "broken"]


class TritonFailure(NotReady):
    """Triton did not do what it should; `reason` says what may help: waiting, loading, or loading anew."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


class Triton:
    """Channels to one server; each call takes, of those that are connected, the one with the fewest calls under way.
    For one event loop.

    address: grpc://HOST:PORT, or grpcs:// for TLS.

    Every method raises TritonFailure, Overloaded or DeadlineExceeded; cancelling one cancels the call at the server.
    """

    def __init__(self, address: str, channels: int = 1) -> None:
        self.address = address
        self._count = channels
        self._clients: list[InferenceServerClient] = []
        self._under_way: list[int] = []

    async def __aenter__(self) -> Self:
        at = urlsplit(self.address)
        for _ in range(self._count):  # made here: a channel belongs to the loop that made it
            self._clients.append(InferenceServerClient(at.netloc, ssl=at.scheme == "grpcs", channel_args=OPTIONS))
        self._under_way = [0] * self._count
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            await client.close()
        self._clients, self._under_way = [], []

    async def infer(
        self, model: str, inputs: Sequence[InferInput], outputs: Sequence[InferRequestedOutput], timeout_s: float,
        priority: int,
    ) -> InferResult:  # fmt: skip
        """One inference. It leaves Triton's queue after `timeout_s`, and is given up then."""
        index = self._least_busy()
        self._under_way[index] += 1
        try:
            return await said(
                self._clients[index].infer(
                    model, inputs, outputs=outputs, priority=priority, timeout=max(int(timeout_s * 1e6), 1),
                    client_timeout=timeout_s,
                )
            )  # fmt: skip
        finally:
            self._under_way[index] -= 1

    def _least_busy(self) -> int:
        """A channel that waits before it connects again fails each call at once, and so is never busy: after a server's
        restart it would draw all calls away from those that are back already. If none is connected, any one will say
        why."""
        states = [client._channel.get_state(try_to_connect=True) for client in self._clients]  # noqa: SLF001 - no other way
        there = [i for i, state in enumerate(states) if state is ChannelConnectivity.READY]
        return min(there or range(self._count), key=self._under_way.__getitem__)

    async def manifests(self, timeout_s: float) -> dict[str, Manifest]:
        """The encoders among its loaded models, by name. Raises also BundleError."""
        client = self.client
        index = await said(client.get_model_repository_index(client_timeout=timeout_s))
        found = {}
        for name in sorted({model.name for model in index.models if model.state == "READY"}):
            config = (await said(client.get_model_config(name, client_timeout=timeout_s))).config
            manifest = manifest_of(config)
            if manifest is not None:
                found[name] = manifest
        return found

    async def loaded(self, model: str, timeout_s: float) -> bool:
        """Triton counts it as ready, which it does for one whose worker has died, too."""
        return bool(await said(self.client.is_model_ready(model, client_timeout=timeout_s)))

    async def load(self, model: str, timeout_s: float) -> None:
        """Returns once it is loaded."""
        await said(self.client.load_model(model, client_timeout=timeout_s))

    async def unload(self, model: str, timeout_s: float) -> None:
        """Returns at once; the model goes when its requests are answered."""
        await said(self.client.unload_model(model, client_timeout=timeout_s))

    @property
    def client(self) -> Any:
        """For what is asked once."""
        return self._clients[self._least_busy()]


def on_this_host(address: str) -> bool:
    return urlsplit(address).hostname in ("localhost", "127.0.0.1", "::1")


async def said(call: Awaitable[T]) -> T:
    """The call's result, or its failure as one of our errors."""
    try:
        return await call
    except InferenceServerException as error:
        raise translated(error) from None


def translated(error: InferenceServerException) -> PatchsightError:
    """Triton's errors by their status; where that is ambiguous, by their text."""
    status, text = str(error.status()).removeprefix("StatusCode."), str(error.message())
    if "maximum queue size" in text:
        return Overloaded("Triton's queue is full")
    if status == "DEADLINE_EXCEEDED" or "timeout expired" in text:
        return DeadlineExceeded("Triton did not answer in time")
    reasons: dict[str, Reason] = {"UNAVAILABLE": "unreachable", "CANCELLED": "unreachable", "NOT_FOUND": "unloaded"}
    return TritonFailure(f"Triton: {text}", reasons.get(status, "broken"))
