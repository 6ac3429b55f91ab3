"""The same objectives from lightly's parts, put together as its own examples do: its transforms in data-loader workers,
its losses, its heads, each view through the student on its own. The backbone is ours in both, so that only the rest
differs.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightly.data import LightlyDataset
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead, SimCLRProjectionHead
from lightly.models.utils import update_momentum
from lightly.transforms import DINOTransform, MAETransform, SimCLRTransform
from torch import Tensor, nn

from patchsight_train.mae import MAE
from patchsight_train.objective import Objective
from patchsight_train.objective_settings import DINOSettings, MAESettings, SimCLRSettings
from patchsight_train.settings import TrainSettings

Step = Callable[[list[Tensor]], Tensor]  # views of a batch to its loss


def transform(settings: TrainSettings) -> Any:
    """With the strengths that our settings have."""
    size = settings.image_size
    blur = (1.0, 0.1, 0.5) if size >= 64 else (0.0, 0.0, 0.0)
    match settings:
        case DINOSettings():
            return DINOTransform(
                global_crop_size=size, global_crop_scale=settings.crop_scale, local_crop_size=settings.local_pixels,
                local_crop_scale=settings.local_scale, n_local_views=settings.local_crops, gaussian_blur=blur,
            )  # fmt: skip
        case SimCLRSettings():
            return SimCLRTransform(
                size, cj_strength=settings.color_strength, min_scale=settings.crop_scale[0],
                gaussian_blur=settings.blur,
            )  # fmt: skip
        case _:
            return MAETransform(size)


def batches(settings: TrainSettings, folder: Path, workers: int) -> Iterator[list[Tensor]]:
    """Endless: views of one batch after the other."""
    loader = torch.utils.data.DataLoader(
        LightlyDataset(str(folder), transform=transform(settings)), settings.batch_size, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=True,
    )  # fmt: skip
    while True:
        for views, *_ in loader:
            yield views if isinstance(views, list) else [views]


def build(settings: TrainSettings, ours: Objective) -> tuple[Step, Callable[[], None], list[nn.Parameter]]:
    """The loss of a batch, what follows the optimizer, and the parameters that it moves."""
    match settings:
        case DINOSettings():
            return dino(settings, ours)
        case SimCLRSettings():
            return simclr(settings, ours)
        case MAESettings():
            return mae(ours)
        case _:
            raise TypeError(type(settings).__name__)


def mae(ours: Objective) -> tuple[Step, Callable[[], None], list[nn.Parameter]]:
    """Encoder and decoder are the network itself: ours."""
    assert isinstance(ours, MAE)

    def step(views: list[Tensor]) -> Tensor:
        noise = torch.rand(len(views[0]), ours.encoder.config.grid**2, device=views[0].device)
        return ours.loss([views[0], noise])[0]

    return step, lambda: None, list(ours.parameters())


def simclr(settings: SimCLRSettings, ours: Objective) -> tuple[Step, Callable[[], None], list[nn.Parameter]]:
    encoder = ours.kept
    head = SimCLRProjectionHead(encoder.config.width, settings.projection_hidden, settings.projection_width)
    criterion = NTXentLoss(settings.temperature)

    def step(views: list[Tensor]) -> Tensor:
        first, second = (head(encoder.pooled(view, "cls")) for view in views)
        loss: Tensor = criterion(first, second)
        return loss

    return step, lambda: None, [*encoder.parameters(), *head.parameters()]


def dino(settings: DINOSettings, ours: Objective) -> tuple[Step, Callable[[], None], list[nn.Parameter]]:
    student, teacher = copy.deepcopy(ours.kept), ours.kept
    student.requires_grad_(True)
    sizes = (student.config.width, settings.head_hidden, settings.bottleneck, settings.prototypes)
    head, teacher_head = DINOProjectionHead(*sizes), DINOProjectionHead(*sizes)
    teacher_head.requires_grad_(False)
    criterion = DINOLoss(settings.prototypes)

    def step(views: list[Tensor]) -> Tensor:
        with torch.no_grad():
            teach = [teacher_head(teacher.pooled(view, "cls")) for view in views[:2]]
        learn = [head(student.pooled(view, "cls")) for view in views]
        loss: Tensor = criterion([t.float() for t in teach], [s.float() for s in learn], epoch=0)
        return loss

    def after() -> None:
        update_momentum(student, teacher, 0.996)
        update_momentum(head, teacher_head, 0.996)

    return step, after, [*student.parameters(), *head.parameters()]
