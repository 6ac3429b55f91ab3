"""Real runs, a minute of training in small: what learns is never suspected, what was made to collapse is named."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Generator, Tensor, nn

from patchsight_train import quality
from patchsight_train.data import Images, load_images
from patchsight_train.objective import Objective, When
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.probe import embed
from patchsight_train.randomness import Randomness
from patchsight_train.settings import TrainSettings
from patchsight_train.signatures import detector, signatures

Learn = Callable[..., tuple[Objective, list[dict[str, float]]]]
Settings = Callable[..., TrainSettings]

RUN: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "width": 32, "depth": 1, "heads": 2, "batch_size": 20, "warmup_epochs": 1,
    "epochs": 6,
}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    "dino": {"prototypes": 128, "head_hidden": 64, "bottleneck": 32, "local_crops": 0, "teacher_momentum": 0.99},
    "swav": {"prototypes": 64, "projection_hidden": 64, "local_crops": 0},
}
PER_EPOCH, STEPS, PATIENCE = 10, 60, 50  # of the 200 photos


@pytest.fixture
def run(
    learn: Learn, photos: Images, settings: Settings
) -> Callable[..., tuple[list[tuple[int, str]], list[dict[str, float]]]]:
    """`run("dino", **changes)`: what the detector said, `(step, text)`, and the metrics; an evaluation at the end."""

    def run(name: str, **changes: Any) -> tuple[list[tuple[int, str]], list[dict[str, float]]]:
        chosen = RUN | HEADS.get(name, {}) | changes
        objective, metrics = learn(name, photos.pixels, STEPS, **chosen)
        z = embed(objective.kept, resized(photos.pixels), objective.pooling, torch.device("cpu"))
        metrics[-1] |= {"rankme": quality.rankme(z), "feature_std": quality.feature_std(z)}
        watching = detector(settings(name, **chosen), 20, PER_EPOCH)
        said = [(step, watching.see(step, values)) for step, values in enumerate(metrics, 1)]
        return [(step, text) for step, text in said if text], metrics

    return run


def resized(pixels: Tensor) -> Tensor:
    small = nn.functional.interpolate(pixels.float(), size=16, mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", ["autoencoder", "skip_autoencoder", "mae", "simclr", "dino", "swav"])
def test_what_learns_is_not_suspected(name: str, run: Callable[..., Any]) -> None:
    said, metrics = run(name)
    assert said == []
    assert metrics[-1]["loss"] != metrics[-2]["loss"]


@pytest.mark.data
@pytest.mark.acceptance
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["autoencoder", "skip_autoencoder", "mae", "simclr", "dino", "swav"])
def test_ten_epochs_of_real_images_at_the_default_settings_are_not_suspected(
    name: str, data: Path, learn: Learn
) -> None:
    images = load_images([str(data / "cifar10" / "train.parquet")], 32, 640, Console(file=io.StringIO()))
    chosen = SETTINGS[name](
        data=["unread"], width=64, depth=2, heads=2, patch_size=4, batch_size=64, epochs=10, warmup_epochs=1,
        device="cpu", precision="fp32",
    )  # fmt: skip
    _, metrics = learn(name, images.pixels, 100, **chosen.model_dump(exclude={"config"}))
    watching = detector(chosen, chosen.batch_size, 10)
    assert [text for step, values in enumerate(metrics, 1) if (text := watching.see(step, values))] == []


@pytest.mark.parametrize(
    ("name", "changes", "holds", "meaning", "remedy"),
    [
        (
            "dino", {"center_momentum": 1.0, "lr": 2e-3}, lambda v: v["teacher_mean_entropy"] < math.log(20) / 4,
            "same few prototypes", "--center-momentum 0.9 (now 1)",
        ),
        (
            "dino", {"teacher_temperature": 0.5, "warmup_teacher_temperature": 0.5},
            lambda v: v["teacher_entropy"] > 0.99 * math.log(128),
            "all 128 prototypes equally likely", "--teacher-temperature 0.04 (now 0.5) --warmup-teacher",
        ),
        (
            "dino", {"center_momentum": 1.0, "teacher_temperature": 0.2, "warmup_teacher_temperature": 0.2, "lr": 4e-3},
            lambda v: v["teacher_mean_entropy"] - v["teacher_entropy"] < 0.02,
            "answers the same to every picture", "--center-momentum 0.9 (now 1)",
        ),
        (
            "simclr", {"lr": 1.0}, lambda v: v["loss"] > 0.99 * math.log(39),
            "no better than chance", "--lr 0.001 (now 1)",
        ),
        (
            "simclr", {"temperature": 100.0}, lambda v: v["loss"] > 0.99 * math.log(39),
            "no better than chance", "--temperature 0.2 (now 100)",
        ),
        (
            "swav", {"epsilon": 1.0}, lambda v: v["code_entropy"] > 0.995 * math.log(64),
            "all 64 prototypes alike", "--epsilon 0.05 (now 1)",
        ),
        (
            "dino", {"lr": 1.0}, lambda v: v["teacher_mean_entropy"] - v["teacher_entropy"] < 0.02,
            "answers the same to every picture", "--lr 0.0005 (now 1)",
        ),
        (
            "mae", {"lr": 3.0, "epochs": 20}, lambda v: v["loss"] > 0.99 * 47 / 48,
            "than by their own mean", "--lr 0.001 (now 3)",
        ),
    ],
)  # fmt: skip
def test_a_collapse_is_named_within_an_epoch_of_it(
    name: str, changes: dict[str, Any], holds: Callable[[dict[str, float]], bool], meaning: str, remedy: str,
    run: Callable[..., Any],
) -> None:  # fmt: skip
    said, metrics = run(name, **changes)
    began = next(i for i in range(STEPS) if sum(map(holds, metrics[i : i + PATIENCE])) >= 0.9 * PATIENCE)
    found = [(step, text) for step, text in said if meaning in text]
    assert len(found) == 1
    step, text = found[0]
    assert step <= max(began, PER_EPOCH // 2) + PATIENCE
    assert remedy in text


@pytest.mark.parametrize(
    ("name", "changes"),
    [("autoencoder", {"lr": 3.0}), ("mae", {"lr": 1.0}), ("swav", {"lr": 1.0}), ("swav", {"epsilon": 1.0})],
)
def test_embeddings_in_one_direction_are_named_at_the_evaluation(
    name: str, changes: dict[str, Any], run: Callable[..., Any]
) -> None:
    said, metrics = run(name, **changes)
    assert said[-1][0] == STEPS
    assert "nearly the same direction: their effective rank is 1 of 32" in said[-1][1]
    assert f"rankme {metrics[-1]['rankme']:.4g}" in said[-1][1]


class Constant(nn.Module):
    """In the place of an encoder: the same for every picture."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.config = encoder.config

    def pooled(self, x: Tensor, pooling: str) -> Tensor:  # noqa: ARG002
        return torch.ones(len(x), self.config.width)


@pytest.mark.parametrize("B", [2, 20])
@pytest.mark.parametrize("name", ["simclr", "swav"])
def test_an_encoder_that_sees_nothing_is_at_the_signature(
    name: str, B: int, objective: Callable[..., Objective], settings: Settings, random_pixels: Tensor
) -> None:
    blind = objective(name)
    blind.encoder = Constant(blind.encoder)
    check_first_signature(blind, settings(name), random_pixels[:B])


def test_a_decoder_that_says_nothing_is_at_the_signature(
    objective: Callable[..., Objective], settings: Settings, random_pixels: Tensor
) -> None:
    mute = objective("mae")
    nn.init.zeros_(mute.decoder_pred.weight)
    nn.init.zeros_(mute.decoder_pred.bias)
    check_first_signature(mute, settings("mae"), random_pixels)


@pytest.mark.parametrize("tau", [0.04, 1e6])
def test_a_teacher_that_sees_nothing_is_at_a_signature(
    tau: float, objective: Callable[..., Objective], settings: Settings, random_pixels: Tensor
) -> None:
    """Too warm it finds all alike; else it has one answer to all pictures, and here a sure one."""
    changes = {"teacher_temperature": tau, "warmup_teacher_temperature": tau}
    blind = objective("dino", **changes)
    blind.student, blind.teacher = Constant(blind.student), Constant(blind.teacher)
    found = [s.holds(v) for s in signatures(settings("dino", **changes), 20)[:3] for v in [told(blind, random_pixels)]]
    assert found == ([True, False, True] if tau > 1 else [False, True, True])


def check_first_signature(objective: Objective, settings: TrainSettings, pixels: Tensor) -> None:
    assert signatures(settings, len(pixels))[0].holds(told(objective, pixels))


def told(objective: Objective, pixels: Tensor) -> dict[str, float]:
    """The metrics of one step, with those that the detector derives."""
    values: dict[str, float] = {}
    views = objective.views(pixels, Randomness(Generator().manual_seed(0)))
    for _, metrics in objective.parts(views, When(1.0, 0.5)):
        values = values | {name: values.get(name, 0.0) + float(x) for name, x in metrics.items()}
    if "teacher_entropy" in values:
        values["teacher_information"] = values["teacher_mean_entropy"] - values["teacher_entropy"]
    return values


@pytest.mark.parametrize("name", SETTINGS)
def test_the_defaults_are_not_unusual_and_every_remedy_is_a_change(name: str) -> None:
    required = {"teacher": "somewhere"} if "teacher" in SETTINGS[name].model_fields else {}
    settings = SETTINGS[name](data=["unread"], **required)
    for signature in signatures(settings, 512):
        assert "Unusual" not in signature.remedy
        assert "--" in signature.remedy
        for flag, now in [(word, rest) for word, _, rest in _flags(signature.remedy)]:
            assert flag in SETTINGS[name].model_fields
            assert now == f"{getattr(settings, flag):.6g}"


def _flags(text: str) -> list[tuple[str, str, str]]:
    """`--lr 0.001 (now 0.004)` to `("lr", "0.001", "0.004")`."""
    found = []
    for piece in text.split("--")[1:]:
        if "(now " in piece:
            name, value, _, now = piece.split()[:4]
            assert value != now.strip(").,")
            found.append((name.replace("-", "_"), value, now[: now.index(")")]))
    return found


def test_small_epochs_are_watched_for_fifty_steps_and_half_the_warmup_is_left_out(settings: Settings) -> None:
    def of(warmup_epochs: float, per_epoch: int) -> tuple[int, int]:
        found = detector(settings("mae", warmup_epochs=warmup_epochs), 8, per_epoch)
        return found.start, found.watches[0].patience

    assert of(10, 4) == (20, 50)
    assert of(0, 400) == (0, 400)
    assert of(3, 100) == (150, 100)
