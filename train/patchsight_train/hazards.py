"""What can end a run from outside of it: no memory, no disk, numbers that are not finite. Each becomes an error that
says what to do, and names the checkpoint from which the run goes on.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_train import checkpoint
from patchsight_train.settings import TrainSettings

# How torch, oneDNN and cuBLAS say that memory is out; only CUDA's caching allocator has an error of its own.
_NO_MEMORY = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|bad_alloc|ALLOC_FAILED|could not create a primitive",
    re.IGNORECASE,
)
_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT,
    errno.ENOTDIR, errno.ESTALE,
}  # fmt: skip


class OutOfMemory(PatchsightError):
    code = "out_of_memory"


class NotWritable(PatchsightError):
    """The run folder cannot be written to: its disk is full, gone, failing, or not ours."""

    code = "not_writable"


class NotFinite(PatchsightError):
    """Too many steps in a row had to be skipped."""

    code = "not_finite"

    def __init__(self, steps: int, settings: TrainSettings) -> None:
        clip = min(settings.clip_grad or 3.0, 3.0) / 3
        ways = [f"--lr {settings.lr / 4:g} (now {settings.lr:g})", f"--clip-grad {clip:g} (now {settings.clip_grad:g})"]
        if settings.precision != "fp32":
            ways.append(f"--precision fp32 (now {settings.precision})")
        super().__init__(
            f"{steps} steps in a row had a loss or a gradient that is not finite. They were skipped, so the weights "
            f"are still those of the last good step, but nothing is learned any more. Try {', '.join(ways)}, "
            f"with another --run, and --init with this one to go on from its weights"
        )


@contextmanager
def step_memory(settings: TrainSettings, images: int) -> Iterator[None]:
    """A training step on so many images of this rank: where it runs out of memory, the error says how to need less.

    Raises:
        OutOfMemory
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_no_memory(error):
            raise
        micro = min(settings.micro_batch or images, images)
        raise OutOfMemory(f"out of memory in a step at micro_batch {micro}: {_less_memory(settings, micro)}") from error


def _less_memory(settings: TrainSettings, micro: int) -> str:
    vit = settings.backbone.startswith("vit-")
    ways = []
    if micro > 1:
        same = "the same numbers" if vit else "batch norm then sees fewer images at once"
        ways.append(f"give the same command with --micro-batch {micro // 2} ({same}, less memory)")
    if vit and not settings.recompute:
        ways.append("--recompute saves more" if ways else "give the same command with --recompute")
    smaller = "a smaller --image-size or --backbone" + (", or a larger --patch-size" if vit else "")
    return "; ".join(ways) or f"only {smaller} needs less"


@contextmanager
def explained(run: Path) -> Iterator[None]:
    """What goes wrong in it with memory or disk is explained, and every error of ours names the newest checkpoint.

    Raises:
        OutOfMemory, NotWritable: instead of what torch, safetensors or the system raised.
    """
    try:
        yield
    except InvalidRequest:
        raise
    except PatchsightError as error:
        error.message = f"{error.message}. {_newest(run)}"
        raise
    except Exception as error:
        if isinstance(error, MemoryError | RuntimeError) and _is_no_memory(error):
            raise OutOfMemory(
                f"out of memory outside of a step: {error}. --no-resident leaves the images on disk, a smaller "
                f"--knn-gallery makes evaluations smaller. {_newest(run)}"
            ) from error
        if path_and_why := _disk_failure(error, run):
            raise NotWritable(
                f"cannot write {path_and_why}. Once it can be written again, the same command goes on. {_newest(run)}"
            ) from error
        raise


def _is_no_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def _disk_failure(error: Exception, run: Path) -> str | None:
    """`path: why` where writing in the run folder failed, else None.

    A failed write names no file, and safetensors' error is no OSError: it has the number in its text.
    """
    if isinstance(error, OSError):
        number, path = error.errno, Path(error.filename or run)
    elif found := re.search(r"\(os error (\d+)\)", str(error)):
        number, path = int(found[1]), run / "checkpoints"
    else:
        return None
    if number not in _DISK or not path.absolute().is_relative_to(run.absolute()):
        return None
    return f"{path}: {os.strerror(number)}"


def _newest(run: Path) -> str:
    steps = checkpoint.complete(run)
    return f"The newest checkpoint is {run / 'checkpoints' / str(steps[-1])}" if steps else "There is no checkpoint yet"
