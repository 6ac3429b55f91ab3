"""What the user leaves open is picked to fit the data and the device, and said with the reason, a line each.

The rules are those of small data and few hours; the recipes that they are drawn from are named beside them. Nothing
here is searched for: the same data on the same device gives the same picks.
"""

import math
from pathlib import Path
from typing import Any, TypeVar

import torch

from patchsight_serve.dataset import read_dataset
from patchsight_serve.errors import InvalidRequest
from patchsight_train.architecture import CHOICES, SIZES, EncoderConfig, ViTConfig
from patchsight_train.choice import Choice, duration, power_of_two, round_down, with_values
from patchsight_train.initial import architecture_of
from patchsight_train.machine import Machine, this_machine
from patchsight_train.objective_settings import DINOSettings, MAESettings, SimCLRSettings, SwAVSettings
from patchsight_train.run import read_config
from patchsight_train.settings import MultiCrop, TrainSettings
from patchsight_train.survey import Survey, survey

S = TypeVar("S", bound=TrainSettings)

SIDES = (8, 16, 24, 32, 48, 64, 96, 224)  # image sizes to pick from, pixels
SMALL = {"width": 128, "depth": 4, "heads": 4}  # the ViT for CPUs: that of train/recipes/simclr-cifar10-cpu.toml
HOURS = {False: 2, True: 8}  # of training, without and with a GPU: a lunch break, a night
MOST_EPOCHS = 1000  # nobody has reported a gain beyond, but for MAE
LARGE_GPU = 16e9  # bytes of memory
BYTES = 48  # that training keeps for each channel of a token in a block, under mixed precision
MOMENTA = (0.9995, 0.999, 0.998, 0.996, 0.99)  # of DINO's teacher


def fill(settings: S, run: Path, device: torch.device) -> tuple[S, list[str]]:
    """What is not given: as in the run that is there already, else picked. And what to say about it, a line each.

    Raises:
        InvalidRequest: the data is not there, or too little; or what was given leaves nothing that fits.
    """
    if (run / "config.toml").is_file():
        return from_run(settings, read_config(run)), [f"{run} is there: what is not given is as it was"]
    found = survey([read_dataset(source) for source in settings.data], settings.limit)
    start = architecture_of(settings.init) if settings.init else None
    return choose(settings, found, this_machine(device, settings), start)


def from_run(settings: S, config: dict[str, Any]) -> S:
    """What is not given as it stands in a run's config.toml; that of another objective changes nothing.

    Raises:
        InvalidRequest: the two do not fit together.
    """
    if config.get("objective") != settings.objective:
        return settings
    known = type(settings).model_fields.keys() - settings.model_fields_set
    return with_values(settings, {name: value for name, value in config.items() if name in known})


def choose(settings: S, found: Survey, machine: Machine, start: EncoderConfig | None = None) -> tuple[S, list[str]]:
    """Settings in which nothing is left to chance, and the reason for each pick, a line each.

    found: what the data is like.
    machine: what will train.
    start: the encoder that the training begins with, if it is not a new one.

    Raises:
        InvalidRequest: there are fewer than two images, or what was given leaves nothing that fits.
    """
    if found.count < 2:
        raise InvalidRequest(f"{found.count} image is too little to train on: a batch needs at least 2")
    choice = Choice(settings)
    if start is not None:
        _as_started(choice, start)
    _encoder(choice, found, machine)
    _sizes(choice, found, machine)
    _stored(choice, found, machine)
    _stem(choice)
    _views(choice, machine)
    _compile(choice, machine)
    _batch(choice, found, machine)
    _epochs(choice, found, machine)
    _rates(choice, found, machine)
    _intervals(choice, machine)
    if found.elongation > 2:
        choice.lines.append(f"of these pictures, {found.elongation:.1f} times as long as wide, only the middle is seen")
    assert isinstance(choice.settings, type(settings))
    return choice.settings, choice.lines


def _as_started(choice: Choice, start: EncoderConfig) -> None:
    """--init: what its weights need."""
    why = f"as in {choice.settings.init}"
    if isinstance(start, ViTConfig):
        own = {name: getattr(start, name) for name in CHOICES if name not in ("backbone", "image_size")}
        choice.pick(why, backbone="vit-tiny", **own)
    else:
        choice.pick(why, backbone=f"resnet{start.depth}", stem=start.stem)


def _encoder(choice: Choice, found: Survey, machine: Machine) -> None:
    s = choice.settings
    if choice.is_set("backbone"):
        return  # its sizes are its own
    size, why = SMALL, "a CPU trains it in hours; vit-tiny (192 × 12) takes five times as long"
    if machine.gpu:
        name = "small" if found.short_side >= 96 else "tiny"
        size, why = SIZES[name], f"vit-{name}, enough for pictures of {found.width} × {found.height}"
    head = size["width"] // size["heads"]
    width = s.width or (s.heads * head if s.heads else size["width"])
    heads = max(h for h in range(1, max(width // head, 1) + 1) if width % h == 0)
    choice.pick(why, width=width, depth=size["depth"], heads=heads)


def _sizes(choice: Choice, found: Survey, machine: Machine) -> None:
    """Pixels of a view and of its patches."""
    s = choice.settings
    patches = 10 if machine.gpu else 8  # about so many a side
    most = (224 if machine.gpu_memory >= LARGE_GPU else 96) if machine.gpu else 64
    there = min(found.short_side * 1.1, s.stored_size or math.inf)
    side, why = next((x for x in reversed(SIDES) if x <= there), SIDES[0]), "larger ones would be blurred"
    if side > most:
        side, why = most, f"larger ones {'a GPU of this size' if machine.gpu else 'a CPU'} does not train in hours"
    if s.backbone.startswith("resnet"):
        choice.pick(f"the median picture is {found.width} × {found.height}, and {why}", image_size=side)
        return
    if choice.is_set("patch_size"):
        side = max(min(side, patches * 3 // 2 * s.patch_size) // s.patch_size, 4) * s.patch_size
    if choice.is_set("image_size"):
        side, why = s.image_size, f"about {patches} × {patches} patches"
    else:
        why = f"the median picture is {found.width} × {found.height}, and {why}"
    local = s.local_size if isinstance(s, MultiCrop) else None
    patch = s.patch_size if choice.is_set("patch_size") else _patch(side, local or 0, patches, s.stem == "conv")
    choice.pick(why, image_size=side, patch_size=patch)  # together: one may not fit to the other's default


def _patch(side: int, local: int, patches: int, conv: bool = False) -> int:
    """The divisor of both sizes that gives nearest to `patches` along `side`; a power of two if one is near, or if the
    stem needs it and there is one."""
    divisors = [p for p in range(1, side + 1) if side % p == 0 and local % p == 0]
    powers = [p for p in divisors if p > 1 and p.bit_count() == 1]
    near = [p for p in powers if conv or patches / 2 <= side / p <= patches * 2]
    return min(near or divisors, key=lambda p: abs(math.log(side / p / patches)))


def _stored(choice: Choice, found: Survey, machine: Machine) -> None:
    side = choice.settings.image_size
    stored = min(found.short_side, side * 3 // 2)
    if stored <= side:
        return
    if found.count * 3 * side**2 <= machine.free_memory < found.count * 3 * stored**2:
        choice.pick("larger pictures would not fit into memory", stored_size=side)
    else:
        choice.pick(f"more than a view's {side}, so that small crops stay sharp", stored_size=stored)


def _stem(choice: Choice) -> None:
    """arXiv:2106.14881. Not for MAE, whose visible patches would see the hidden ones, and not for large pictures, where
    it costs more than the blocks."""
    s = choice.settings
    fits = s.backbone.startswith("vit-") and s.image_size <= 64 and s.patch_size > 1 and s.patch_size.bit_count() == 1
    if fits and isinstance(s, SimCLRSettings | MultiCrop):
        choice.pick("convolutions before the blocks learn faster from small pictures", stem="conv")


def _views(choice: Choice, machine: Machine) -> None:
    """What an objective makes of a picture."""
    s = choice.settings
    if isinstance(s, SimCLRSettings):
        if s.image_size >= 64:
            choice.pick("the paper's, for photos", color_strength=1.0, blur=0.5)
        else:
            choice.pick("as the paper has it for few pixels", color_strength=0.5, blur=0.0)
        if not machine.gpu:
            choice.pick("short trainings learn more from larger crops", crop_scale=(0.2, 1.0))
        if s.backbone.startswith("resnet"):
            choice.pick("suits ResNets", temperature=0.5)
    if isinstance(s, MultiCrop):
        if s.image_size < 32:
            choice.pick(f"half of {s.image_size} pixels shows nothing", local_crops=0)
        elif not machine.gpu:
            choice.pick("most of what 6 teach, for less time", local_crops=4)


def _compile(choice: Choice, machine: Machine) -> None:
    if machine.compiles and isinstance(choice.settings.architecture, ViTConfig):
        choice.pick("1.4 times as fast on an H200, after half a minute", compile=True)


def _batch(choice: Choice, found: Survey, machine: Machine) -> None:
    """Small ones do: SimCLR on CIFAR-10 has 84.7 at 128 and 84.8 at 512 (lightly's benchmarks), DINO on ImageNet has
    57.9 at 128 and 59.9 at 1,024 (its Table 9). More than a quarter of the images would leave few steps."""
    s, N = choice.settings, found.count
    if isinstance(s, SimCLRSettings | SwAVSettings):
        most, why = 512 if machine.gpu else 256, "an image is told from the others of its batch"
    elif isinstance(s, DINOSettings):
        most, why = 256 if machine.gpu else 64, "DINO needs no large one, and more steps teach more"
    else:
        most, why = 512 if machine.gpu else 128, "more steps teach more"
    size = min(most, max(power_of_two(N / 4), min(power_of_two(N), 8)))
    if size < most:
        why = f"{N // size} step{'s' * (N // size > 1)} an epoch from {N:,} images"
    choice.pick(why, batch_size=max(size // machine.ranks, 1) * machine.ranks)
    _micro_batch(choice, machine)


def _micro_batch(choice: Choice, machine: Machine) -> None:
    """For a GPU that does not hold the activations of a whole batch."""
    s = choice.settings
    if not machine.gpu or not isinstance(s.architecture, ViTConfig):
        return
    config = s.architecture
    view = (config.grid**2 + config.prefix_tokens) * config.width * config.depth * BYTES
    fitting = power_of_two(machine.gpu_memory / 2 / (2 * view))  # two views of an image at once
    if fitting < s.batch_size // machine.ranks:
        choice.pick(f"what {machine.gpu_memory / 1e9:.0f} GB hold; the numbers stay", micro_batch=fitting)


def _epochs(choice: Choice, found: Survey, machine: Machine) -> None:
    """As many as the hours give."""
    s, N, hours = choice.settings, found.count, HOURS[machine.gpu]
    rate = machine.images_per_s(s)
    within = rate * hours * 3600 / N
    most = 2 * MOST_EPOCHS if isinstance(s, MAESettings) else MOST_EPOCHS
    if within > most:
        why = "more would hardly teach anything new"
    elif within >= 1:
        why = f"what {hours} hours give"
    else:
        why = f"one pass over {N:,} images; --limit {round_down(rate * hours * 3600)} would take {hours} hours"
    choice.pick(why, epochs=min(round_down(within), most))
    seconds = choice.settings.epochs * N / rate
    choice.lines.append(f"about {duration(seconds)} on {machine.name}, at some {round_down(rate):,} images/s")


def _rates(choice: Choice, found: Survey, machine: Machine) -> None:
    """Schedules, by the number of steps."""
    s, N = choice.settings, found.count
    B, epochs = min(s.batch_size, N), s.epochs
    base, at = (5e-4, 128) if isinstance(s, DINOSettings) else (1e-3, 256)
    lr = float(f"{base * math.sqrt(B / at):.1e}")
    choice.pick(f"{base:g} at a batch of {at}, else by the square root of its size, as suits AdamW", lr=lr)
    choice.pick("a tenth of the epochs", warmup_epochs=epochs / 10)
    frozen = max(epochs / 100, min(1.0, epochs / 20))
    choice.pick("the encoder first", freeze_last_layer_epochs=frozen, freeze_prototypes_epochs=frozen)
    if isinstance(s, DINOSettings):
        steps = epochs * max(N // B, 1)
        momentum = next((m for m in MOMENTA if 25 / (1 - m) <= steps), 0.98)
        choice.pick(f"an average over {1 / (1 - momentum):.0f} of {steps:,} steps", teacher_momentum=momentum)
        most = 65_536 if machine.gpu and N >= 1_000_000 else 4096
        choice.pick(f"{N:,} images need no more", prototypes=max(min(power_of_two(N), most), 1024))
    if isinstance(s, SwAVSettings):
        choice.pick(f"{N:,} images need no more", prototypes=max(min(power_of_two(N / 8), 512), 32))


def _intervals(choice: Choice, machine: Machine) -> None:
    s = choice.settings
    choice.pick("some twenty times in all", knn_every=round_down(s.epochs / 20))
    steps = 300 * machine.images_per_s(s) / s.batch_size
    choice.pick("steps, about five minutes", checkpoint_every=min(max(round_down(steps), 10), 5000))
