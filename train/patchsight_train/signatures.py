"""By which numbers each objective's collapse is told, what they mean, and which settings help. Imports no torch.

Every objective has answers that need no picture: all classes alike, one class for everything, all similarities equal.
There its metrics take values that are known beforehand, whatever the data.
"""

import math

from patchsight_train.collapse import CollapseDetector, Signature
from patchsight_train.objective_settings import (
    DINOSettings,
    DistillationSettings,
    MAESettings,
    SimCLRSettings,
    SoftTargetsSettings,
    SwAVSettings,
)
from patchsight_train.settings import TrainSettings

ANY = math.inf

# Between which values settings are known to train; the defaults lie within. What lies beyond is suspected first.
_USUAL: dict[type[TrainSettings], dict[str, tuple[float, float]]] = {
    TrainSettings: {"lr": (0, 0.01)},
    DINOSettings: {
        "teacher_temperature": (0.01, 0.07),
        "warmup_teacher_temperature": (0.01, 0.07),
        "teacher_momentum": (0.9, 1),
        "center_momentum": (0.5, 0.99),
    },
    SwAVSettings: {"epsilon": (0.01, 0.05), "temperature": (0.05, 0.5)},
    SimCLRSettings: {"temperature": (0.05, 1)},
    MAESettings: {"mask_ratio": (0.1, 0.9)},
}


def detector(settings: TrainSettings, batch_size: int, steps_per_epoch: int) -> CollapseDetector:
    """For a run with so many images a step, over all ranks.

    A signature must hold for an epoch, after half of the warm-up: at first some hold for every network.
    """
    start = round(settings.warmup_epochs * steps_per_epoch / 2)
    return CollapseDetector(signatures(settings, batch_size), max(50, steps_per_epoch), start)


def signatures(settings: TrainSettings, batch_size: int) -> list[Signature]:
    """What to look out for under these settings."""
    return [*_of_objective(settings, batch_size), _of_embeddings(settings)]


def _of_objective(settings: TrainSettings, batch_size: int) -> list[Signature]:
    match settings:
        case DINOSettings():
            return [_uniform(settings), _one_class(settings, batch_size), _same_answer(settings)]
        case SwAVSettings():
            return [_flat_codes(settings)]
        case SimCLRSettings():
            return [_chance(settings, batch_size)]
        case MAESettings() if settings.normalize_pixels:
            return [_mean_of_patches(settings)]
        case DistillationSettings() if not isinstance(settings, SoftTargetsSettings):
            return [_perpendicular(settings)]
        case _:
            return [_frozen(settings)]


def _uniform(s: DINOSettings) -> Signature:
    """H(t) = ln K, and the loss H(t, s) is never less than H(t)."""
    limit = math.log(s.prototypes)
    return Signature(
        {"teacher_entropy": (0.99 * limit, ANY), "loss": (0.98 * limit, ANY)},
        f"The teacher finds all {s.prototypes:,} prototypes equally likely in every picture, its entropy is "
        f"ln {s.prototypes:,} = {limit:.4g}: there is nothing to learn from it",
        _remedy(s, f"Sharpen it: {_change(s, teacher_temperature=s.teacher_temperature / 2)}, or {_slower_teacher(s)}"),
    )


def _one_class(s: DINOSettings, batch_size: int) -> Signature:
    """The mean target of the batch has little entropy: few prototypes are used at all."""
    most = math.log(min(s.prototypes, batch_size))  # a sharp teacher that tells all images apart has that
    return Signature(
        {"teacher_mean_entropy": (0, most / 4), "loss": (0, math.log(s.prototypes) / 4)},
        "The teacher sees the same few prototypes in every picture: nothing need be learned to agree with it",
        _remedy(s, f"Fewer prototypes: {_change(s, prototypes=max(s.prototypes // 4, 64))}, or {_slower_teacher(s)}"),
    )


def _same_answer(s: DINOSettings) -> Signature:
    """Neither quite of the two above, but its answer does not depend on the picture."""
    return Signature(
        {"teacher_information": (-ANY, 0.02), "teacher_entropy": (0, ANY)},
        "The teacher answers the same to every picture: there is nothing to learn from it",
        _remedy(s, f"Sharpen it: {_change(s, teacher_temperature=s.teacher_temperature / 2)}, or {_slower_teacher(s)}"),
    )


def _slower_teacher(s: DINOSettings) -> str:
    return f"let it follow more slowly: {_change(s, teacher_momentum=1 - (1 - s.teacher_momentum) / 4)}"


def _flat_codes(s: SwAVSettings) -> Signature:
    limit = math.log(s.prototypes)
    return Signature(
        {"code_entropy": (0.995 * limit, ANY), "loss": (0.98 * limit, ANY)},
        f"Every picture is assigned to all {s.prototypes:,} prototypes alike, the codes' entropy is "
        f"ln {s.prototypes:,} = {limit:.4g}: there is nothing to predict",
        _remedy(s, f"Sharpen the codes: {_change(s, epsilon=s.epsilon / 2)}, or {_gentler(s)}"),
    )


def _chance(s: SimCLRSettings, batch_size: int) -> Signature:
    limit = math.log(2 * batch_size - 1)
    return Signature(
        {"loss": (0.99 * limit, ANY)},
        f"The loss is no better than chance, ln (2 · {batch_size:,} − 1) = {limit:.4g}: no picture is known again",
        _remedy(s, f"If that lasts, {_gentler(s)}"),
    )


def _mean_of_patches(s: MAESettings) -> Signature:
    """Targets have mean 0 and unbiased variance 1, so a prediction of 0 costs (n − 1) / n."""
    n = 3 * s.patch_size**2
    return Signature(
        {"loss": (0.99 * (n - 1) / n, ANY)},
        "The hidden patches are predicted no better than by their own mean: the visible ones are of no use",
        _remedy(s, f"If that lasts, {_gentler(s)}, or hide less: {_change(s, mask_ratio=s.mask_ratio * 2 / 3)}"),
    )


def _perpendicular(s: DistillationSettings) -> Signature:
    return Signature(
        {"loss": (0.95, ANY)},
        "The student's embeddings have nothing in common with the teacher's, their cosine is 0",
        _remedy(s, f"If that lasts, {_gentler(s)}"),
    )


def _frozen(s: TrainSettings) -> Signature:
    """For objectives whose metrics have no value that is known beforehand."""
    return Signature(
        {"loss_change": (0, 1e-5)},
        "The loss is the same for every batch: the answer does not depend on the picture",
        _remedy(s, f"If that lasts, {_gentler(s)}"),
    )


def _of_embeddings(s: TrainSettings) -> Signature:
    return Signature(
        {"rankme": (0, 2), "feature_std": (0, 0.25)},
        f"All images are embedded in nearly the same direction: their effective rank is 1 of {s.architecture.width}",
        _remedy(s, f"If that lasts, {_gentler(s)}"),
        lasting=False,
    )


def _gentler(s: TrainSettings) -> str:
    return f"learn more gently: {_change(s, lr=s.lr / 4, warmup_epochs=max(2 * s.warmup_epochs, 1))}"


def _remedy(settings: TrainSettings, otherwise: str) -> str:
    """The settings that are unusual, put back to their defaults; without such, `otherwise`. All is for another run."""
    unusual = {
        name: type(settings).model_fields[name].default
        for kind, usual in _USUAL.items()
        if isinstance(settings, kind)
        for name, (low, high) in usual.items()
        if not low <= getattr(settings, name) <= high
    }
    first = f"Unusual, and so the likely cause: {_change(settings, **unusual)}" if unusual else otherwise
    return f"{first} (with another --run)"


def _change(settings: TrainSettings, **values: float) -> str:
    """`--lr 0.001 (now 0.004)` for each."""
    return " ".join(
        f"--{name.replace('_', '-')} {value:.6g} (now {getattr(settings, name):.6g})" for name, value in values.items()
    )
