"""Shared memory where Triton does not want it, is gone for a while, or the call is given up. That it holds the right
numbers is shown in tests/triton."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode
from tritonclient.utils import InferenceServerException

from patchsight_serve import triton_leftovers
from patchsight_serve.manifest import Manifest
from patchsight_serve.triton_client import TritonFailure
from patchsight_serve.triton_memory import TritonMemory


class FakeTriton:
    """Registers regions, or fails as told."""

    def __init__(self, status: StatusCode | None) -> None:
        self.status = status
        self.known: list[str] = []
        self.client = self

    async def register_system_shared_memory(self, name: str, key: str, size: int, client_timeout: float) -> None:
        assert key == f"/{name}"
        assert (Path("/dev/shm") / name).stat().st_size >= size
        assert client_timeout
        if self.status is not None:
            raise InferenceServerException("no", status=self.status)
        self.known.append(name)

    async def unregister_system_shared_memory(self, name: str, client_timeout: float) -> None:
        assert client_timeout
        self.known.remove(name)


async def names(memory: TritonMemory, times: int) -> list[str | None]:
    """The slots that calls one after the other get."""
    found = []
    for _ in range(times):
        async with memory.slot() as slot:
            found.append(slot and slot.name)
    return found


def ours() -> list[Path]:
    return list(Path("/dev/shm").glob("patchsight-*"))


def run(triton: FakeTriton, manifest: Manifest, work: Any) -> None:
    async def inside() -> None:
        memory = TritonMemory(triton, manifest)  # type: ignore[arg-type]
        await work(memory)
        await memory.aclose()

    before = ours()
    asyncio.run(inside())
    assert ours() == before, "a region was left behind"
    assert triton.known == []


def test_a_slot_is_used_again(manifest: Manifest) -> None:
    async def work(memory: TritonMemory) -> None:
        first, second = await names(memory, 2)
        assert first is not None
        assert first == second

    run(FakeTriton(None), manifest, work)


def test_a_triton_elsewhere_is_asked_once(manifest: Manifest) -> None:
    triton = FakeTriton(StatusCode.INVALID_ARGUMENT)

    async def work(memory: TritonMemory) -> None:
        assert await names(memory, 1) == [None]
        triton.status = None
        assert await names(memory, 1) == [None]

    run(triton, manifest, work)


@pytest.mark.parametrize("status", [StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED])
def test_a_triton_that_is_back_shares_memory_again(status: StatusCode, manifest: Manifest) -> None:
    triton = FakeTriton(status)

    async def work(memory: TritonMemory) -> None:
        assert await names(memory, 20) == [None] * 20
        triton.status = None
        assert await names(memory, 1) != [None]

    run(triton, manifest, work)


def test_a_call_that_is_given_up_costs_its_slot(manifest: Manifest) -> None:
    async def work(memory: TritonMemory) -> None:
        given_up: list[str] = []

        async def call() -> None:
            async with memory.slot() as slot:
                assert slot is not None
                given_up.append(slot.name)
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await call()
        (after,) = await names(memory, 1)
        assert after not in (None, given_up[0])

    run(FakeTriton(None), manifest, work)


def test_after_a_failure_no_slot_of_before_is_used(manifest: Manifest) -> None:
    """Triton may have started anew: it would fail one request for each region that it does not know any more."""

    async def work(memory: TritonMemory) -> None:
        async with memory.slot() as a, memory.slot() as b:
            assert a is not None
            assert b is not None
        assert len(memory._free) == 2

        async def call() -> None:
            async with memory.slot():
                raise TritonFailure("Triton: Unable to find shared memory region", "broken")

        with pytest.raises(TritonFailure):
            await call()
        (after,) = await names(memory, 1)
        assert after not in (None, a.name, b.name)

    run(FakeTriton(None), manifest, work)


def test_what_a_killed_gateway_left_behind_is_given_back(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here and at Triton; what a living one holds, and what is just being made, stays."""
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    program = (
        "import sys, time; from patchsight_serve.manifest import Manifest; "
        "from patchsight_serve.triton_memory import Slot; "
        "slot = Slot(Manifest.model_validate_json(open(sys.argv[1]).read())); print(slot.name, flush=True); "
        "time.sleep(100)"
    )
    line = [sys.executable, "-c", program, str(tmp_path / "manifest.json")]
    others = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names_there = [(other.stdout.readline() if other.stdout else "").strip() for other in others]
    dead, living = (triton_leftovers.MEMORY / name for name in names_there)
    others[0].kill()
    others[0].wait()
    time.sleep(1.0)  # nobody else takes it away, or Triton would have it mapped for ever
    assert dead.exists()
    triton = FakeTriton(None)
    triton.known += names_there

    try:
        monkeypatch.setattr(triton_leftovers, "YOUNG_S", 60.0)
        assert not {dead.name, living.name} & set(triton_leftovers.left_behind())
        monkeypatch.setattr(triton_leftovers, "YOUNG_S", 0.0)
        asyncio.run(triton_leftovers.sweep(triton))  # type: ignore[arg-type]
        assert not dead.exists()
        assert living.exists()
        assert triton.known == [living.name]
    finally:
        others[1].kill()
        others[1].wait()
        for other in others:
            assert other.stdout
            other.stdout.close()
        for path in (dead, living):
            path.unlink(missing_ok=True)
