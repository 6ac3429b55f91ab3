"""What the device can do in how much time: measured for an encoder in a second, and reckoned for an objective."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from patchsight_train import distributed
from patchsight_train.architecture import EncoderConfig, ViTConfig
from patchsight_train.build import build_encoder
from patchsight_train.data import available_memory, ranks_here
from patchsight_train.device import pick_precision
from patchsight_train.encoder import Encoder
from patchsight_train.objective_settings import AutoencoderSettings, DINOSettings, MAESettings, SimCLRSettings
from patchsight_train.settings import MultiCrop, TrainSettings

MEASURED_S = 0.7  # seconds
SCALING = 0.85  # n CPU threads are worth n^0.85
TOKENS = {"cpu": 1024, "cuda": 65_536}  # in a pass: enough that more of them are no faster
OVERHEAD = 1.3  # augmentation, heads and optimizer, on top of the encoder (1.2 to 1.4 measured)


@dataclass(frozen=True)
class Machine:
    """What each of `ranks` has.

    name: of the device, for people. gpu_memory: bytes, 0 where there is no GPU. free_memory: bytes that decoded
    pictures can take. views_per_s: images of an encoder's own size that go through it forward and backward in a second.
    """

    name: str
    gpu_memory: float
    free_memory: float
    views_per_s: Callable[[EncoderConfig], float]
    ranks: int = 1
    compiles: bool = False  # torch.compile for the GPU needs a C compiler too

    @property
    def gpu(self) -> bool:
        return self.gpu_memory > 0

    def images_per_s(self, settings: TrainSettings) -> float:
        """What training with `settings` comes to, over all ranks, roughly."""
        return self.ranks * self.views_per_s(settings.architecture) / (OVERHEAD * passes(settings))


def this_machine(device: torch.device, settings: TrainSettings) -> Machine:
    """The one that training with `settings` will run on; the same on every rank."""
    dtype = pick_precision(settings.precision, device)

    def agreed(own: float) -> float:
        return float(distributed.mean_over_ranks(torch.tensor(own, device=device)))

    @cache
    def speed(config: EncoderConfig) -> float:
        return agreed(views_per_s(config, device, dtype))

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, float(properties.total_memory)
    else:
        threads = torch.get_num_threads()
        name, memory = f"{threads} CPU thread{'s' * (threads > 1)}", 0.0
    free = agreed(0.8 * min(available_memory(), 2.0**60) / ranks_here())  # infinity has no mean
    compiles = device.type == "cuda" and any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang"))
    return Machine(name, memory, free, speed, distributed.world(), compiles)


def views_per_s(config: EncoderConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Of an encoder with random weights, at its best of a few passes.

    On a CPU one thread is measured, by its own clock, and the others are reckoned: so what else runs there, in this
    second, has no say in what is picked for the next hours.
    """
    threads = torch.get_num_threads()
    encoder = build_encoder(config).to(device)
    tokens = config.prefix_tokens + config.grid**2
    x = torch.randn(max(TOKENS[device.type] // tokens, 2), 3, config.image_size, config.image_size, device=device)
    if device.type == "cuda":
        return fitting(x, lambda x: len(x) / _best(encoder, x, dtype, time.perf_counter))
    torch.set_num_threads(1)
    try:
        return len(x) / _best(encoder, x, dtype, time.process_time) * math.pow(threads, SCALING)
    finally:
        torch.set_num_threads(threads)


def fitting(x: Tensor, run: Callable[[Tensor], float]) -> float:
    """`run` on as much of the batch as the GPU has memory for: all of it, a half, a quarter, …, two at least."""
    while True:
        try:
            return run(x)
        except torch.OutOfMemoryError:
            if len(x) <= 2:
                raise
        x = x[: max(len(x) // 2, 2)]
        torch.cuda.empty_cache()  # outside of `except`, whose error holds the tensors of the pass that failed


def _best(encoder: Encoder, x: Tensor, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Seconds of the fastest pass, forward and backward, after a first one that sets up kernels: on a GPU that alone
    takes longer than all the others."""

    def seconds() -> float:
        start = clock()
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
            tokens = encoder(x)
        loss = tokens.float().square().mean()
        loss.backward()
        if x.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    seconds()
    best, begun = seconds(), clock()
    while clock() - begun < MEASURED_S:
        best = min(best, seconds())
    return best


def passes(settings: TrainSettings) -> float:
    """How many views of an encoder's own size, forward and backward, one image costs.

    A forward alone is a third of one. The teachers of distillation are not counted: they run elsewhere.
    """
    if isinstance(settings, MultiCrop):
        local = settings.local_crops * (settings.local_pixels / settings.image_size) ** 2
        teacher = 2 / 3 if isinstance(settings, DINOSettings) else 0.0
        return 2 + teacher + local
    if isinstance(settings, SimCLRSettings):
        return 2
    if isinstance(settings, MAESettings):
        return 1 - settings.mask_ratio + _decoder(settings, settings.decoder_width, settings.decoder_depth)
    if isinstance(settings, AutoencoderSettings):
        return 1 + _decoder(settings, settings.decoder_width, settings.decoder_depth)
    return 1


def _decoder(settings: TrainSettings, width: int, depth: int) -> float:
    """Of blocks on all patches, relative to the encoder's."""
    config = settings.architecture
    return width**2 * depth / (config.width**2 * config.depth) if isinstance(config, ViTConfig) else 0.1
