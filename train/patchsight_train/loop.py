"""The one training loop: steps, schedules, mixed precision, metrics, k-NN, checkpoints.

It knows no objective by name. A step's randomness comes from (seed, step) alone, and an epoch's order from
(seed, epoch), so that a run killed and resumed equals one that was never stopped.
"""

import math
import signal
import time
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Generator, Tensor, nn

from patchsight_serve.errors import InvalidRequest
from patchsight_train import checkpoint
from patchsight_train.data import Images
from patchsight_train.objective import Objective
from patchsight_train.probe import Probe
from patchsight_train.run import Metrics
from patchsight_train.schedule import cosine, warmup_cosine
from patchsight_train.settings import TrainSettings


class Trainer:
    """One run of one objective on one device."""

    def __init__(
        self, objective: Objective, images: Images, probe: Probe | None, settings: TrainSettings, run: Path,
        console: Console,
    ) -> None:  # fmt: skip
        self.settings, self.run, self.console, self.probe = settings, run, console, probe
        self.device = pick_device(settings.device)
        self.dtype = pick_precision(settings.precision, self.device)
        self.objective = objective.to(self.device)
        self.pixels = images.pixels.to(self.device)
        self.steps_per_epoch = max(len(images) // settings.batch_size, 1)
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.optimizer = adamw(objective, settings)
        self.step = 0
        if checkpoint.complete(run):
            saved = checkpoint.load(run)
            checkpoint.restore(saved, self.objective, self.optimizer, run)
            self.step = saved.step
            console.print(f"resuming at step {self.step:,} of {self.total_steps:,}")

    def train(self) -> None:
        """Run to the last step. After Ctrl-C the step is finished and a checkpoint written, then KeyboardInterrupt."""
        self.metrics = Metrics(self.run, self.step)
        columns = (
            TextColumn("{task.fields[epoch]}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        try:
            with Progress(*columns, console=self.console) as bar, CtrlC() as stop:
                task = bar.add_task("", total=self.total_steps, completed=self.step, epoch="", state="")
                while self.step < self.total_steps and not stop.asked:
                    self.one_step(bar, task)
                    if self.step % self.settings.checkpoint_every == 0:
                        self.save()
                self.save()
        finally:
            self.metrics.close()
        if self.step < self.total_steps:
            self.console.print(f"stopped at step {self.step:,}; the same command goes on from there")
            raise KeyboardInterrupt

    def one_step(self, bar: Progress, task: TaskID) -> None:
        """One update, its metrics, and k-NN where an epoch that asks for it ends."""
        start = time.perf_counter()
        images = self.batch()
        values = self.update(images)
        self.step += 1
        epoch = self.step / self.steps_per_epoch
        values["images_per_s"] = round(len(images) / (time.perf_counter() - start), 1)
        if self.probe and self.knn_is_due():
            values["knn"] = self.probe.accuracy(self.objective.kept, self.objective.pooling, self.device)
            bar.console.print(f"epoch {int(epoch)}: loss {values['loss']:.4f}, 20-NN {values['knn']:.4f}")
        self.metrics.write(self.step, epoch=round(epoch, 4), **values)
        state = f"loss {values['loss']:.4f} · {values['images_per_s']:.0f} images/s"
        bar.update(task, completed=self.step, epoch=f"epoch {math.ceil(epoch)}/{self.settings.epochs}", state=state)

    def knn_is_due(self) -> bool:
        """After the last step, and after every epoch that is a multiple of `knn_every`."""
        epochs, rest = divmod(self.step, self.steps_per_epoch)
        every = self.settings.knn_every
        return every > 0 and rest == 0 and (epochs % every == 0 or epochs == self.settings.epochs)

    def batch(self) -> Tensor:
        """This step's images, uint8 `(B, 3, S, S)`: a slice of the epoch's own permutation."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = torch.randperm(len(self.pixels), generator=Generator().manual_seed(mix(self.settings.seed, epoch, 1)))
        chosen = order[place * self.settings.batch_size :][: self.settings.batch_size]
        return self.pixels[chosen.to(self.device)]

    def update(self, images: Tensor) -> dict[str, float]:
        """Forward, backward, one move of the optimizer; a step whose loss or gradient is not finite moves nothing."""
        settings, objective = self.settings, self.objective
        generator = Generator(self.device).manual_seed(mix(settings.seed, self.step, 2))
        self.set_rates()
        views = objective.views(images, generator)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss, extra = objective.loss(views, generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        objective.before_update(self.step / self.steps_per_epoch)
        norm = nn.utils.clip_grad_norm_(objective.parameters(), settings.clip_grad or math.inf)
        finite = math.isfinite(loss.item()) and math.isfinite(norm.item())
        if finite:
            self.optimizer.step()
            objective.after_update(self.step / self.total_steps)
        values = {"loss": loss.item(), "lr": self.optimizer.param_groups[0]["lr"], "gradient_norm": norm.item()}
        return values | {name: value.item() for name, value in extra.items()} | ({} if finite else {"skipped": 1.0})

    def set_rates(self) -> None:
        """This step's learning rate and weight decay."""
        s = self.settings
        warmup = round(s.warmup_epochs * self.steps_per_epoch)
        lr = warmup_cosine(self.step, self.total_steps, warmup, s.lr, s.final_lr)
        final = s.weight_decay if s.final_weight_decay is None else s.final_weight_decay
        decay = cosine(self.step, self.total_steps, s.weight_decay, final)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = decay if group["decays"] else 0.0

    def save(self) -> None:
        self.metrics.sync()
        checkpoint.save(self.run, self.step, self.objective, self.optimizer)


class CtrlC:
    """Within it Ctrl-C is remembered, so that no update is cut in half; a second one interrupts at once."""

    def __enter__(self) -> Self:
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def adamw(objective: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW, arXiv:1711.05101; biases, norms and single tokens are not decayed."""
    trained = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    plain = [p for n, p in trained if p.ndim == 1 or n.endswith(("cls_token", "reg_token", "mask_token", "pos_embed"))]
    decayed = [p for _, p in trained if not any(p is q for q in plain)]
    groups = [{"params": decayed, "decays": True}, {"params": plain, "decays": False}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises InvalidRequest for a GPU that is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InvalidRequest("--device cuda: torch finds no GPU here; use --device auto or cpu")
    return torch.device(("cuda" if available else "cpu") if name == "auto" else name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the device computes it in hardware, else fp32; never fp16."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def mix(seed: int, number: int, purpose: int) -> int:
    """One generator seed for each (seed, number, purpose)."""
    return (seed * 1_000_003 + number) * 4 + purpose
