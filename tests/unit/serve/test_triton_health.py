"""The watch over a model on Triton, against a Triton that fails as told."""

import asyncio
from collections.abc import Callable

import pytest

from patchsight_serve import triton_health
from patchsight_serve.errors import DeadlineExceeded, PatchsightError
from patchsight_serve.pace import Pace
from patchsight_serve.triton_client import TritonFailure
from patchsight_serve.triton_health import TritonHealth

EVERY_S = 0.02
DEAD = TritonFailure("Triton: Stub process is not healthy", "broken")
GONE = TritonFailure("Triton: failed to connect", "unreachable")
UNKNOWN = TritonFailure("Triton: Request for unknown model", "unloaded")
LATE = DeadlineExceeded("Triton did not answer in time")


class FakeTriton:
    """Whose model fails with `wrong` until it is loaded; `mends` says whether that helps."""

    def __init__(self, wrong: PatchsightError | None, mends: bool = True, is_loaded: bool = True) -> None:
        self.wrong, self.mends, self.is_loaded = wrong, mends, is_loaded
        self.asked: list[str] = []
        self.patience: list[float] = []

    async def probe(self, timeout_s: float) -> None:
        self.patience.append(timeout_s)
        if self.wrong is not None:
            raise self.wrong

    async def loaded(self, model: str, timeout_s: float) -> bool:
        assert (model, timeout_s) == ("tiny", triton_health.UNLOAD_S)
        return self.is_loaded

    async def unload(self, model: str, timeout_s: float) -> None:
        assert (model, timeout_s) == ("tiny", triton_health.UNLOAD_S)
        self.asked.append("unload")
        self.is_loaded = False

    async def load(self, model: str, timeout_s: float) -> None:
        assert (model, timeout_s) == ("tiny", triton_health.LOAD_S)
        self.asked.append("load")
        if not self.mends:
            raise TritonFailure("Triton: failed to load", "broken")
        self.is_loaded, self.wrong = True, None


def watch(triton: FakeTriton, until: Callable[[TritonHealth], bool], pace: Pace | None = None) -> TritonHealth:
    """Let the watch run until `until`, which it must reach."""

    async def run() -> TritonHealth:
        health = TritonHealth(triton, "tiny", triton.probe, pace or Pace(), EVERY_S)  # type: ignore[arg-type]
        task = asyncio.create_task(health.watch())
        async with asyncio.timeout(10):
            while not until(health):
                await asyncio.sleep(0.005)
        assert not task.done()
        task.cancel()
        return health

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("wrong", "is_loaded", "asked"),
    [(DEAD, True, ["unload", "load"]), (UNKNOWN, False, ["load"])],
)
def test_a_model_is_loaded_anew(wrong: PatchsightError, is_loaded: bool, asked: list[str]) -> None:
    """Triton believes that a model with a dead worker is ready: a load alone would not heal it."""
    triton = FakeTriton(wrong, is_loaded=is_loaded)
    health = watch(triton, lambda health: bool(triton.asked) and health.failure is None)
    assert triton.asked == asked
    assert health.failure is None


@pytest.mark.parametrize("wrong", [GONE, LATE])
def test_where_loading_does_not_help_it_is_waited(wrong: PatchsightError) -> None:
    """A server that is gone comes back by itself; a model that is late may be busy."""
    triton = FakeTriton(wrong)
    health = watch(triton, lambda _: len(triton.patience) > 8)
    assert health.failure is wrong
    assert triton.asked == []
    triton.wrong = None
    assert watch(triton, lambda _: len(triton.patience) > 12).failure is None


def test_a_model_that_hangs_is_loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_health, "HANGING_S", 0.1)
    triton = FakeTriton(LATE)
    watch(triton, lambda health: bool(triton.asked) and health.failure is None)
    assert triton.asked == ["unload", "load"]


def test_a_model_that_does_not_come_up_is_not_loaded_without_end() -> None:
    """The first attempt is followed by a pause of a second, while probes go on."""
    triton = FakeTriton(DEAD, mends=False)
    health = watch(triton, lambda _: len(triton.patience) > 15)
    assert triton.asked == ["unload", "load"]
    assert health.failure is DEAD


def test_a_success_is_as_good_as_a_probe() -> None:
    triton = FakeTriton(None)

    async def run() -> int:
        health = TritonHealth(triton, "tiny", triton.probe, Pace(), 0.2)  # type: ignore[arg-type]
        health.succeeded()
        task = asyncio.create_task(health.watch())
        for _ in range(30):
            await asyncio.sleep(0.01)
            health.succeeded()
        task.cancel()
        return len(triton.patience)

    assert asyncio.run(run()) == 0


def test_a_failure_of_a_request_is_looked_into_at_once() -> None:
    triton = FakeTriton(None)

    async def run() -> None:
        health = TritonHealth(triton, "tiny", triton.probe, Pace(), 60)  # type: ignore[arg-type]
        health.succeeded()
        task = asyncio.create_task(health.watch())
        await asyncio.sleep(0.01)
        assert triton.patience == []
        health.failed()
        async with asyncio.timeout(5):
            while not triton.patience:
                await asyncio.sleep(0.005)
        task.cancel()

    asyncio.run(run())


def test_patience_grows_with_the_time_that_a_full_batch_takes() -> None:
    """An encoder of 50 ms an image works 3.2 s on a batch: a probe behind it is not lost."""
    pace = Pace()
    pace._seconds, pace._images = 0.05, 1.0
    triton = FakeTriton(None)
    watch(triton, lambda _: bool(triton.patience), pace)
    assert triton.patience[0] == pytest.approx(1.5 * 0.05 * 64)
    quick = Pace()
    quick._seconds, quick._images = 0.0001, 1.0
    triton = FakeTriton(None)
    watch(triton, lambda _: bool(triton.patience), quick)
    assert triton.patience[0] == triton_health.PATIENCE_S


def test_the_watch_outlives_what_nobody_foresaw() -> None:
    triton = FakeTriton(RuntimeError("no such thing"))  # type: ignore[arg-type]
    watch(triton, lambda _: len(triton.patience) > 3)
