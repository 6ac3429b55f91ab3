"""A real Triton server with shipped encoders, started by the tests, and its processes to be killed."""

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from measure import ROOT
from triton_process import ENVIRONMENT, TritonProcess

from patchsight_serve.dataset import read_dataset
from patchsight_serve.triton_models import write_triton_models

MODELS = ROOT / "model_repository"
ENCODERS = ("dino-vit-cifar10", "simclr-vit-tiny-cifar10-long")
GIVEN_BACK_S = 60.0  # the other test process may just have killed a gateway, whose memory the next one gives back


@pytest.fixture(scope="session")
def start_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TritonProcess]]:
    """`start_triton(bundle, …)`: a Triton that serves them by its python backend. All are stopped at the end."""
    if not any(ENVIRONMENT.glob("lib/python*/site-packages/pytriton")):
        pytest.skip(f"no Triton in {ENVIRONMENT}: `make .triton-venv/.built` installs it, on x86-64 Linux")
    running: list[TritonProcess] = []
    before = _left_behind()

    def start(*bundles: Path) -> TritonProcess:
        folder = tmp_path_factory.mktemp("triton")
        write_triton_models(bundles, folder / "models", "python")
        triton = TritonProcess(folder / "models", folder / "log")
        triton.start()
        running.append(triton)
        return triton

    yield start
    for triton in running:
        if triton.harmed:  # Triton itself cannot end in peace once a worker was killed
            triton.kill()
        else:
            assert triton.stop() == 0
    ends = time.monotonic() + GIVEN_BACK_S
    while (left := _left_behind() - before) and time.monotonic() < ends:
        time.sleep(0.5)
    assert not left, "shared memory was left behind"


def _left_behind() -> set[str]:
    """Shared memory of gateways and Tritons that have ended, and of this process. Others may be running here."""
    names = [file.name for file in Path("/dev/shm").glob("patchsight*")]
    return {name for name in names if (pid := re.search(r"\d+", name)) and not _other(int(pid.group()))}


def _other(pid: int) -> bool:
    return pid != os.getpid() and Path(f"/proc/{pid}").exists()


@pytest.fixture(scope="session")
def triton(start_triton: Callable[..., TritonProcess]) -> TritonProcess:
    """A Triton that no test may harm."""
    return start_triton(*(MODELS / name for name in ENCODERS))


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same encoders for a server that runs them itself."""
    folder = tmp_path_factory.mktemp("bundles") / "model_repository"
    folder.mkdir()
    for name in ENCODERS:
        (folder / name).symlink_to(MODELS / name)
    return folder


@pytest.fixture(scope="session")
def photos(data: Path) -> list[bytes]:
    """Some of CIFAR-10's test images, as files."""
    dataset = read_dataset(data / "cifar10" / "test.parquet")
    return [dataset.read(i) for i in range(96)]
