"""Two gateway processes on one port in front of one Triton."""

import contextlib
import io
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from measure import ROOT
from process_group import PATIENCE_S, Group

from patchsight_serve.decode import decode
from patchsight_serve.ort_encoder import OrtEncoder

ENCODER = "dino-vit-cifar10"
NPY = {"Accept": "application/x-npy"}
LARGE = 64  # photos, whose patch tokens go through shared memory


@pytest.fixture
def group(triton: Any) -> Iterator[Group]:
    group = Group("--triton", triton.address, "--encoder", ENCODER, "--max-images", str(LARGE))
    yield group
    with contextlib.suppress(ProcessLookupError):
        group.process.kill()
    group.process.wait(10)


def regions(pid: int) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"patchsight-{pid}-*")]


def test_both_answer_and_one_that_is_killed_leaves_nothing_behind(group: Group, photos: list[bytes]) -> None:
    url, (first, second) = group.ready(), group.pids()
    served = OrtEncoder(ROOT / "model_repository" / ENCODER, threads=1)
    pixels = np.stack([decode(photo, served.manifest.transform) for photo in photos[:LARGE]])
    wanted = served.run(pixels, ["patch_tokens"])["patch_tokens"]
    files = [("images", (f"{i}.png", photo)) for i, photo in enumerate(photos[:LARGE])]

    def ask() -> None:
        """On a new connection: the system chooses who answers."""
        reply = httpx.post(f"{url}/embed", params={"outputs": "patch_tokens"}, files=files, headers=NPY, timeout=60)
        assert reply.status_code == 200, reply.text
        found = np.load(io.BytesIO(reply.content))
        assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()

    def ask_until(*pids: int) -> None:
        """Until each of them has answered over shared memory of its own."""
        for _ in range(100):
            ask()
            if all(regions(pid) for pid in pids):
                return
        raise AssertionError(f"{pids}: {[regions(pid) for pid in pids]}")

    ask_until(first, second)
    os.kill(first, signal.SIGKILL)
    group.said(rf"process {first} died with status -9")
    assert regions(first)
    (*_, third) = [int(pid) for pid in group.said(r"process (\d+) answers", 3)]
    ask_until(second, third)
    for _ in range(300):  # it looks for what was left behind some seconds after its start
        if not regions(first):
            break
        time.sleep(0.1)
    assert regions(first) == []

    group.process.send_signal(signal.SIGTERM)
    assert group.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in group.log.read_text()
    assert [regions(pid) for pid in (second, third)] == [[], []]
