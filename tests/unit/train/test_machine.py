"""What training costs: reckoned by views, against counted operations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from patchsight_train.architecture import ResNetConfig, ViTConfig
from patchsight_train.build import build, build_encoder
from patchsight_train.machine import Machine, _best, fitting, passes, this_machine, views_per_s
from patchsight_train.objective import When
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.randomness import Randomness

CPU = torch.device("cpu")
# Wide enough for the blocks to outweigh what is not counted; heads and decoder's ends as small as they can be.
ENCODER: dict[str, Any] = {"image_size": 32, "patch_size": 4, "width": 96, "depth": 4, "heads": 3}
SMALL_HEADS: dict[str, dict[str, Any]] = {
    "simclr": {"projection_hidden": 8, "projection_width": 8},
    "dino": {"prototypes": 8, "head_hidden": 8, "bottleneck": 8, "local_crops": 5},
    "swav": {"prototypes": 8, "projection_hidden": 8, "projection_width": 8, "local_crops": 3},
    "mae": {"decoder_width": 64, "decoder_depth": 3},
    "autoencoder": {"decoder_width": 64, "decoder_depth": 2, "bottleneck": 8},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchsight_train.machine.MEASURED_S", 0.05)


def operations(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SMALL_HEADS)
def test_passes_are_what_is_computed(name: str) -> None:
    B = 4
    settings = SETTINGS[name](data=["unread"], **ENCODER, **SMALL_HEADS[name])
    objective = build(settings)
    images = torch.randint(0, 256, (B, 3, 32, 32), dtype=torch.uint8)
    views = objective.views(images, Randomness(torch.Generator().manual_seed(0)))
    encoder = build_encoder(settings.architecture)
    x = torch.randn(B, 3, 32, 32)

    def train() -> None:
        for part, _ in objective.parts(views, When(1.0, 0.1)):
            part.backward()

    one = operations(lambda: encoder(x).sum().backward())
    assert operations(train) / one == pytest.approx(passes(settings), rel=0.12)


@pytest.mark.parametrize("config", [ViTConfig(width=48, depth=2, heads=2), ResNetConfig(16)])
def test_measuring_leaves_the_threads_as_they_were(config: Any) -> None:
    torch.set_num_threads(2)
    try:
        assert views_per_s(config, CPU, torch.float32) > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_wider_encoder_is_slower() -> None:
    narrow, wide = (views_per_s(ViTConfig(width=w, depth=2, heads=2), CPU, torch.float32) for w in (32, 256))
    assert wide < narrow / 4


def test_a_speed_is_measured_once() -> None:
    settings = SETTINGS["mae"](data=["unread"], image_size=8, patch_size=4, width=16, depth=1, heads=1, device="cpu")
    machine = this_machine(CPU, settings)
    assert machine.images_per_s(settings) == machine.images_per_s(settings)
    assert not machine.gpu
    assert machine.free_memory > 0
    assert "CPU" in machine.name


def test_ranks_add_up() -> None:
    def machine(ranks: int) -> Machine:
        return Machine("one", 0, 1e9, lambda _: 100.0, ranks)

    settings = SETTINGS["simclr"](data=["unread"])
    assert machine(4).images_per_s(settings) == pytest.approx(4 * machine(1).images_per_s(settings))
    assert machine(1).images_per_s(settings) < 50  # two views, and what comes on top


def test_speed_is_of_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.weight.register_hook(lambda _: seen.append(True))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * self.weight

    monkeypatch.setattr("patchsight_train.machine.build_encoder", lambda _: Spy())
    views_per_s(ViTConfig(), CPU, torch.float32)
    assert seen


def test_a_slow_first_pass_does_not_count() -> None:
    """A GPU sets up its kernels in the first one: longer than the whole measurement may take."""
    now = iter([0.0, 10.0, *(10.0 + 0.1 * i for i in range(1, 100))])  # seconds: the first pass takes ten
    seconds = _best(nn.Flatten(), torch.ones(2, 3, requires_grad=True), torch.float32, lambda: next(now))
    assert seconds == pytest.approx(0.1)


@pytest.mark.parametrize(("room", "taken"), [(100, 20), (12, 10), (5, 5), (3, 2), (2, 2)])
def test_the_speed_of_a_large_encoder_is_measured_on_as_many_images_as_fit(room: int, taken: int) -> None:
    def run(x: torch.Tensor) -> float:
        if len(x) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return float(len(x))

    assert fitting(torch.zeros(20, 3), run) == taken


def test_where_not_even_two_images_fit_the_error_stays() -> None:
    def run(x: torch.Tensor) -> float:
        raise torch.OutOfMemoryError(f"CUDA out of memory with {len(x)}")

    with pytest.raises(torch.OutOfMemoryError, match="with 2"):
        fitting(torch.zeros(20, 3), run)
