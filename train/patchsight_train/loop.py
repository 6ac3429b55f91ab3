"""The one training loop: batches, updates, metrics, evaluation, checkpoints.

It knows no objective by name. A step's randomness comes from (seed, step) alone, and an epoch's order from
(seed, epoch), so that a run killed and resumed equals one that was never stopped, on any number of ranks.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Generator, Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_train import checkpoint, distributed
from patchsight_train.collapse import Collapsed
from patchsight_train.data import Batches, DataLost, Images
from patchsight_train.device import pick_device, pick_precision
from patchsight_train.display import Display
from patchsight_train.hazards import NotFinite, step_memory
from patchsight_train.interrupt import Interrupt
from patchsight_train.objective import Objective
from patchsight_train.report import write_report
from patchsight_train.run import Metrics
from patchsight_train.settings import TrainSettings
from patchsight_train.signatures import detector
from patchsight_train.stream import StreamedImages
from patchsight_train.tensorboard_log import TensorBoardLog
from patchsight_train.update import Updater, mix

if TYPE_CHECKING:
    from patchsight_train.evaluation import Evaluation

REPORT_EVERY_S = 60.0
REPORT_SHARE = 50  # times as long as writing it took: reports grow with the run
MOST_SKIPPED = 50  # steps in a row


class Trainer:
    """One run of one objective on this rank's device."""

    def __init__(
        self, objective: Objective, images: Images | StreamedImages, evaluation: "Evaluation | None",
        settings: TrainSettings, run: Path, console: Console,
    ) -> None:  # fmt: skip
        self.settings, self.run, self.console, self.evaluation = settings, run, console, evaluation
        self.batch_size = _batch_size(len(images), settings.batch_size)
        self.steps_per_epoch = len(images) // self.batch_size
        self.total_steps = settings.epochs * self.steps_per_epoch
        device = pick_device(settings.device)
        dtype = pick_precision(settings.precision, device)
        self.updater = Updater(objective, settings, device, dtype, self.total_steps, self.steps_per_epoch)
        self.objective, self.device = self.updater.objective, device
        self.images = images.on_device(device)
        self.leader = distributed.rank() == 0  # the rank that writes
        self.step = self.skipped_in_a_row = 0
        self.collapsed = ""  # why the run is to stop
        if checkpoint.complete(run):
            saved = checkpoint.load(run)
            checkpoint.restore(saved, self.objective, self.updater.optimizer, run)
            self.step = saved.step
            console.print(f"resuming at step {self.step:,} of {self.total_steps:,}")

    def train(self) -> None:
        """Run to the last step. After Ctrl-C the step is finished and a checkpoint written, then KeyboardInterrupt."""
        settings = self.settings
        distributed.barrier()  # every rank has read the checkpoint before the first writes another
        self.metrics = Metrics(self.run, self.step) if self.leader else None
        self.tensorboard = TensorBoardLog(self.run, self.step) if settings.tensorboard and self.leader else None
        self.detector = detector(settings, self.batch_size, self.steps_per_epoch)
        for line in self.metrics.lines() if self.metrics else []:
            self.detector.see(line["step"], line)
        self.report_due = time.monotonic() + REPORT_EVERY_S
        batches = self.images.batches(self.orders(), self.device)
        display = Display(self.console, self.total_steps, settings.epochs, self.steps_per_epoch, self.step)
        try:
            with display as self.display, Interrupt() as interrupt:
                while self.step < self.total_steps and not self.asked_to_stop(interrupt):
                    self.one_step(batches)
                    if self.step % settings.checkpoint_every == 0:
                        self.save()
                self.save()
        except (DataLost, InvalidRequest):  # no image is to be had any more
            self.write_checkpoint()
            raise
        finally:
            batches.close()
            if self.tensorboard:
                self.tensorboard.close()
            if self.metrics:
                self.metrics.close()
        self.write_report()
        if self.collapsed:
            raise Collapsed(self.collapsed)
        if self.step < self.total_steps:
            self.console.print(f"stopped at step {self.step:,}; the same command goes on from there")
            raise KeyboardInterrupt

    def asked_to_stop(self, interrupt: Interrupt) -> bool:
        """By a person, or by what the leader has seen; all ranks stop at the same step."""
        return distributed.any_rank(interrupt.asked or bool(self.collapsed), self.device)

    def write_report(self) -> None:
        """Where this rank is the one that writes."""
        if self.leader:
            start = time.monotonic()
            write_report(self.run)
            now = time.monotonic()
            self.report_due = now + max(REPORT_EVERY_S, REPORT_SHARE * (now - start))

    def orders(self) -> Iterator[Tensor]:
        """From the current step on: which images this rank takes, int64 `(b,)`, of the epoch's own permutation."""
        b = self.batch_size // distributed.world()
        known, order = -1, torch.empty(0)
        for step in range(self.step, self.total_steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != known:
                generator = Generator().manual_seed(mix(self.settings.seed, epoch, 1))
                known, order = epoch, torch.randperm(len(self.images), generator=generator)
            first = place * self.batch_size + distributed.rank() * b
            yield order[first : first + b]

    def one_step(self, batches: Batches) -> None:
        """One update, its metrics, and an evaluation where an epoch that asks for it ends."""
        start = time.perf_counter()
        images = next(batches)
        with step_memory(self.settings, len(images)):
            values = self.updater.update(images, self.step)
        self.step += 1
        values["images_per_s"] = round(self.batch_size / (time.perf_counter() - start), 1)
        if self.leader:
            self.record(values)
        self.check_finite("skipped" in values)

    def record(self, values: dict[str, float]) -> None:
        """Everything that only one rank does after a step."""
        assert self.metrics is not None
        epoch = self.step / self.steps_per_epoch
        self.display.step(self.step, values)
        evaluated = self.evaluate(epoch) if self.evaluation and self.evaluation_is_due() else {}
        warning = self.detector.see(self.step, {**values, **evaluated})
        said = {"warning": warning} if warning else {}
        self.metrics.write(self.step, epoch=round(epoch, 4), **values, **evaluated, **said)
        if self.tensorboard:
            self.tensorboard.write(self.step, {**values, **evaluated})
        if warning:
            self.display.warn(warning)
        if evaluated or warning or time.monotonic() > self.report_due:
            self.write_report()
        if warning and self.settings.on_collapse == "stop":
            self.collapsed = warning

    def evaluate(self, epoch: float) -> dict[str, float]:
        assert self.evaluation is not None
        values = self.evaluation.measure(self.objective, self.device)
        self.evaluation.draw(self.objective, self.device)
        self.display.evaluated(epoch, values)
        return values

    def evaluation_is_due(self) -> bool:
        """After the last step, and after every epoch that is a multiple of `knn_every`."""
        epochs, rest = divmod(self.step, self.steps_per_epoch)
        every = self.settings.knn_every
        return every > 0 and rest == 0 and (epochs % every == 0 or epochs == self.settings.epochs)

    def check_finite(self, skipped: bool) -> None:
        """Raises NotFinite when too many steps in a row were skipped: nothing is learned any more."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise NotFinite(self.skipped_in_a_row, self.settings)

    def save(self) -> None:
        self.write_checkpoint()
        distributed.barrier()

    def write_checkpoint(self) -> None:
        """By the leader alone, without waiting for ranks that may be gone."""
        if self.metrics:
            self.metrics.sync()
            checkpoint.save(self.run, self.step, self.objective, self.updater.optimizer)


def _batch_size(images: int, asked: int) -> int:
    """Images a step: what was asked for, or all there are; equally many on every rank.

    Raises:
        InvalidRequest: the ranks cannot share it.
    """
    world = distributed.world()
    if asked % world:
        raise InvalidRequest(f"--batch-size {asked} is not a multiple of the {world} ranks")
    size = min(asked, images) // world * world
    if size < max(2, world):
        raise InvalidRequest(f"{images} images are too few for {world} ranks: one for each is needed, and 2 at least")
    return size
