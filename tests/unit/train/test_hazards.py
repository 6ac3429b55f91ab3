import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_train.collapse import Collapsed
from patchsight_train.data import DataLost
from patchsight_train.hazards import NotFinite, NotWritable, OutOfMemory, explained, step_memory
from patchsight_train.settings import TrainSettings

Settings = Callable[..., TrainSettings]

NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("could not create a primitive"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc"),
]


def names(errors: list[Exception]) -> list[str]:
    return [str(error)[:30] for error in errors]


@pytest.mark.parametrize("error", NO_MEMORY, ids=names(NO_MEMORY))
def test_a_step_without_memory_says_which_knob_to_turn_and_to_what(error: Exception, settings: Settings) -> None:
    with pytest.raises(OutOfMemory) as caught, step_memory(settings("mae"), 512):
        raise error
    assert caught.value.message == (
        "out of memory in a step at micro_batch 512: give the same command with --micro-batch 256 (the same numbers, "
        "less memory); --recompute saves more"
    )
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("changes", "images", "advice"),
    [
        ({"micro_batch": 64}, 512, "64: {same} 32 (the same numbers, less memory); --recompute saves more"),
        ({"micro_batch": 1000}, 512, "512: {same} 256 (the same numbers, less memory); --recompute saves more"),
        ({"recompute": True}, 512, "512: {same} 256 (the same numbers, less memory)"),
        ({"micro_batch": 1}, 8, "1: give the same command with --recompute"),
        (
            {"micro_batch": 1, "recompute": True}, 8,
            "1: only a smaller --image-size or --backbone, or a larger --patch-size needs less",
        ),
        (
            {"backbone": "resnet18", "width": None, "depth": None, "heads": None}, 7,
            "7: {same} 3 (batch norm then sees fewer images at once, less memory)",
        ),
    ],
)  # fmt: skip
def test_the_knob_is_one_that_is_left(changes: dict[str, Any], images: int, advice: str, settings: Settings) -> None:
    with pytest.raises(OutOfMemory) as caught, step_memory(settings("simclr", **changes), images):
        raise MemoryError
    same = "give the same command with --micro-batch"
    assert caught.value.message == f"out of memory in a step at micro_batch {advice.format(same=same)}"


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x")])
def test_other_errors_of_a_step_stay_what_they_are(error: Exception, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, explained(tmp_path), step_memory(settings("mae"), 8):
        raise error
    assert caught.value is error


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two checkpoints, and what is left of a third."""
    for step in ("90", "120", ".partial"):
        (tmp_path / "run" / "checkpoints" / step).mkdir(parents=True)
    return tmp_path / "run"


@pytest.mark.parametrize("error", NO_MEMORY, ids=names(NO_MEMORY))
def test_no_memory_outside_of_a_step_has_other_knobs(error: Exception, run: Path) -> None:
    with pytest.raises(OutOfMemory, match="outside of a step.*--no-resident.*--knn-gallery.*checkpoints/120$"), \
            explained(run):  # fmt: skip
        raise error


DISK = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
    OSError(errno.EIO, os.strerror(errno.EIO)),
]


@pytest.mark.parametrize("error", DISK, ids=names(DISK))
def test_a_disk_that_does_not_take_it_is_named_with_the_newest_checkpoint(error: OSError, run: Path) -> None:
    with pytest.raises(NotWritable) as caught, explained(run):
        raise error
    assert caught.value.message == (
        f"cannot write {run}: {os.strerror(error.errno)}. Once it can be written again, the same command goes on. "
        f"The newest checkpoint is {run / 'checkpoints' / '120'}"
    )


def test_the_file_is_named_where_it_is_known(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotWritable, match=f"cannot write {run / 'report.html'}: Permission denied"), explained(run):
        raise PermissionError(errno.EACCES, "", str(run / "report.html"))
    with pytest.raises(NotWritable, match="cannot write .*/run/checkpoints: No space left on device"), explained(run):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    monkeypatch.chdir(run.parent)
    with pytest.raises(NotWritable, match="cannot write run/config.partial"), explained(Path("run")):
        raise OSError(errno.ENOSPC, "", "run/config.partial")


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    run = tmp_path / "file" / "run"
    with pytest.raises(NotWritable, match=f"cannot write {run}: Not a directory.*There is no checkpoint yet$"), \
            explained(run):  # fmt: skip
        run.mkdir(parents=True)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "", "/elsewhere/encoder.json"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        SafetensorError("Error while deserializing header: invalid header"),
        ValueError("(os error unknown)"),
    ],
)
def test_what_is_no_failure_of_the_runs_disk_stays_what_it_is(error: Exception, run: Path) -> None:
    with pytest.raises(type(error)) as caught, explained(run):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("kind", [DataLost, Collapsed, OutOfMemory])
def test_every_error_that_ends_a_run_names_the_newest_checkpoint(kind: type[PatchsightError], run: Path) -> None:
    with pytest.raises(kind) as caught, explained(run):
        raise kind("it is over")
    assert caught.value.message == f"it is over. The newest checkpoint is {run / 'checkpoints' / '120'}"


def test_a_mistake_in_the_settings_is_left_alone(run: Path) -> None:
    with pytest.raises(InvalidRequest) as caught, explained(run):
        raise InvalidRequest("no such thing")
    assert caught.value.message == "no such thing"


def test_steps_that_are_not_finite_name_what_to_change(settings: Settings) -> None:
    text = NotFinite(50, settings("dino", lr=2e-3, clip_grad=3.0, precision="bf16")).message
    assert "50 steps in a row" in text
    assert "Try --lr 0.0005 (now 0.002), --clip-grad 1 (now 3), --precision fp32 (now bf16), with another --run" in text
    text = NotFinite(50, settings("mae", lr=1e-3, clip_grad=0.0, precision="fp32")).message
    assert "Try --lr 0.00025 (now 0.001), --clip-grad 1 (now 0), with another --run" in text
