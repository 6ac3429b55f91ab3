"""`--data folder/` alone: what is picked fits the data, the device, and what the user gave."""

import io
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from patchsight_serve.dataset import read_dataset
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_train.architecture import EncoderConfig, ResNetConfig, ViTConfig
from patchsight_train.build import build
from patchsight_train.data import load_images
from patchsight_train.defaults import HOURS, SIDES, _patch, choose, fill, from_run
from patchsight_train.machine import Machine
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.run import config_of, open_run, read_config
from patchsight_train.survey import Survey, survey
from patchsight_train.update import Updater

CPU = torch.device("cpu")


def speed(operations: float) -> Any:
    """Views in a second of a device of so many block operations; ResNets like a ViT of 128 × 4."""

    def views_per_s(config: EncoderConfig) -> float:
        if isinstance(config, ResNetConfig):
            return operations / (65 * 128**2 * 4)
        return operations / ((config.grid**2 + config.prefix_tokens) * config.width**2 * config.depth)

    return views_per_s


LAPTOP = Machine("2 CPU threads", 0, 8e9, speed(1.4e9))  # 330 views a second of the CPU's ViT at 64 px: measured
SMALL_GPU = Machine("a small GPU", 8e9, 16e9, speed(2e11))
LARGE_GPU = Machine("a large GPU", 80e9, 128e9, speed(4e12))


def found(count: int, width: int, height: int) -> Survey:
    short, long = sorted((width, height))
    return Survey(count, width, height, short, short, long / short)


PHOTOS = found(700, 160, 213)
KINDS = {
    "twelve": found(12, 160, 213),
    "two": found(2, 160, 213),
    "icons": found(5000, 8, 8),
    "tinier": found(5000, 3, 5),
    "photos": PHOTOS,
    "cameras": found(3000, 4000, 3000),
    "strips": found(300, 20, 1000),
    "ten million": found(10_000_000, 256, 256),
    "odd": found(1237, 101, 47),
}
OBJECTIVES = ["autoencoder", "skip_autoencoder", "mae", "simclr", "dino", "swav", "distillation", "soft_targets"]


def settings(objective: str, **given: Any) -> Any:
    teacher = {"teacher": Path("nowhere")} if objective in ("distillation", "soft_targets") else {}
    return SETTINGS[objective](data=["unread"], **teacher, **given)


def test_every_objective_is_tried() -> None:
    assert set(OBJECTIVES) == SETTINGS.keys()


@pytest.mark.parametrize(
    ("objective", "kind", "machine"),
    [(objective, kind, machine) for objective in ("mae", "dino") for kind in KINDS for machine in (LAPTOP, LARGE_GPU)]
    + [(objective, "photos", SMALL_GPU) for objective in OBJECTIVES]
    + [(objective, "icons", LAPTOP) for objective in OBJECTIVES if objective not in ("mae", "dino")],
)
def test_anything_gives_settings_that_fit(objective: str, kind: str, machine: Machine) -> None:
    data = KINDS[kind]
    chosen, lines = choose(settings(objective), data, machine)
    encoder = chosen.architecture
    assert isinstance(encoder, ViTConfig)
    assert encoder.image_size in SIDES
    assert encoder.image_size <= max(data.short_side * 1.1, 8)  # never blown up by much
    assert 2 <= encoder.grid <= 16
    assert chosen.image_size <= chosen.pixels_kept <= max(data.short_side, chosen.image_size)
    assert 2 <= chosen.batch_size <= data.count
    assert chosen.warmup_epochs < chosen.epochs
    assert 1 <= chosen.knn_every <= chosen.epochs
    assert objective != "mae" or encoder.stem == "patch"
    assert all(": " in line or line.startswith(("about", "of these")) for line in lines)
    assert len({line.split(" ")[0] for line in lines}) == len(lines)  # each is told once
    hours = chosen.epochs * data.count / machine.images_per_s(chosen) / 3600
    assert hours <= HOURS[machine.gpu] or chosen.epochs == 1
    assert choose(settings(objective), data, machine) == (chosen, lines)


GIVEN: list[dict[str, Any]] = [
    {"image_size": 96}, {"image_size": 40}, {"image_size": 64, "patch_size": 4}, {"patch_size": 16}, {"patch_size": 2},
    {"patch_size": 32}, {"width": 96}, {"heads": 6}, {"depth": 7}, {"width": 240, "heads": 5},
    {"backbone": "vit-small"},
    {"epochs": 3}, {"batch_size": 48}, {"lr": 0.1}, {"warmup_epochs": 0}, {"stored_size": 32}, {"stem": "patch"},
    {"image_size": 64, "width": 96, "batch_size": 32, "epochs": 5, "lr": 1e-4}, {"registers": 4}, {"limit": 50},
    {"knn_every": 0}, {"checkpoint_every": 7}, {"mlp_ratio": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("machine", [LAPTOP, LARGE_GPU])
@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("objective", ["mae", "dino"])
def test_what_is_given_stays_and_the_rest_adapts(objective: str, given: dict[str, Any], machine: Machine) -> None:
    chosen, lines = choose(settings(objective, **given), PHOTOS, machine)
    assert {name: getattr(chosen, name) for name in given} == given
    told = {name.split(" ")[0] for line in lines for name in line.split(": ")[0].split(", ")}
    assert not told & given.keys()
    encoder = chosen.architecture
    assert isinstance(encoder, ViTConfig)
    assert encoder.image_size % encoder.patch_size == encoder.width % encoder.heads == 0
    if not {"image_size", "patch_size"} <= given.keys():
        assert 4 <= encoder.grid <= 20


@pytest.mark.parametrize(
    ("given", "compiles", "expected"),
    [({}, True, True), ({}, False, False), ({"compile": False}, True, False), ({"backbone": "resnet18"}, True, False)],
)
def test_blocks_are_compiled_where_that_is_possible(given: dict[str, Any], compiles: bool, expected: bool) -> None:
    chosen, lines = choose(settings("simclr", **given), PHOTOS, replace(LARGE_GPU, compiles=compiles))
    assert chosen.compile is expected
    assert any(line.startswith("compile") for line in lines) is (compiles and not given)


def test_local_crops_fit_the_patches_that_are_picked() -> None:
    chosen, _ = choose(settings("dino", image_size=96, local_size=36), PHOTOS, LAPTOP)
    assert chosen.patch_size == 12
    assert chosen.local_pixels == 36


def test_patches_divide_any_size() -> None:
    for side in range(8, 260):
        patch = _patch(side, 0, 8)
        divisors = [p for p in range(1, side + 1) if side % p == 0]
        assert patch in divisors
        if any(4 <= side / p <= 16 for p in divisors):
            assert 4 <= side / patch <= 16
        if any(side % p == 0 and 4 <= side / p <= 16 for p in (2, 4, 8, 16, 32)):
            assert patch.bit_count() == 1  # what a conv stem needs


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("objective", ["simclr", "dino", "swav", "autoencoder", "distillation"])
def test_resnets(objective: str, backbone: str) -> None:
    chosen, _ = choose(settings(objective, backbone=backbone), PHOTOS, LAPTOP)
    assert chosen.architecture == ResNetConfig(64, 18 if backbone == "resnet18" else 50, "cifar")
    assert chosen.width is None
    if objective == "simclr":
        assert chosen.temperature == 0.5


def test_one_image_is_too_few() -> None:
    with pytest.raises(InvalidRequest, match="1 image is too little to train on: a batch needs at least 2"):
        choose(settings("dino"), found(1, 100, 100), LAPTOP)


def test_more_images_less_epochs_and_a_faster_device_more() -> None:
    epochs = [
        choose(settings("dino"), found(n, 160, 160), LAPTOP)[0].epochs for n in (100, 1000, 10_000, 100_000, 10**6)
    ]
    assert epochs == sorted(epochs, reverse=True)
    assert len(set(epochs)) >= 4
    faster = Machine("16 CPU threads", 0, 8e9, speed(1.4e10))
    assert choose(settings("dino"), PHOTOS, faster)[0].epochs > choose(settings("dino"), PHOTOS, LAPTOP)[0].epochs


def test_two_measurements_of_one_device_give_the_same_picks() -> None:
    first, second = (Machine("2 CPU threads", 0, 8e9, speed(1.4e9 * x)) for x in (0.97, 1.03))
    one, two = (choose(settings("dino"), PHOTOS, m)[0] for m in (first, second))
    assert one == two


def test_schedules_follow_the_epochs_that_are_given() -> None:
    chosen, lines = choose(settings("dino", epochs=1), PHOTOS, LAPTOP)
    assert chosen.warmup_epochs == 0.1
    assert chosen.freeze_last_layer_epochs < 1  # else nothing would be learned by it
    assert any(line.startswith("about a minute") for line in lines)


def test_the_rate_follows_the_batch() -> None:
    small, large = (choose(settings("simclr", batch_size=B), PHOTOS, LAPTOP)[0] for B in (64, 256))
    assert large.lr == pytest.approx(2 * small.lr)
    assert large.lr == 1e-3  # train/recipes/simclr-cifar10-cpu.toml


def test_ranks_share_the_batch() -> None:
    chosen, _ = choose(settings("simclr"), found(50_000, 32, 32), Machine("a GPU", 80e9, 1e11, speed(4e12), ranks=3))
    assert chosen.batch_size % 3 == 0


def test_a_small_gpu_takes_a_batch_in_parts() -> None:
    small, large = (choose(settings("simclr"), found(9000, 400, 300), m)[0] for m in (SMALL_GPU, LARGE_GPU))
    assert small.micro_batch is not None
    assert small.micro_batch < small.batch_size
    assert small.image_size < large.image_size


def test_pictures_are_kept_smaller_where_memory_asks_for_it() -> None:
    room = 700 * 3 * 64**2
    chosen, _ = choose(settings("dino"), PHOTOS, Machine("2 CPU threads", 0, room * 1.5, speed(1.4e9)))
    assert (chosen.image_size, chosen.stored_size) == (64, 64)


def test_the_encoder_that_training_starts_with_decides() -> None:
    start = ViTConfig(image_size=32, patch_size=4, width=96, depth=3, heads=3, registers=2, stem="conv")
    chosen, _ = choose(settings("dino", init=Path("there")), PHOTOS, LAPTOP, start)
    encoder = chosen.architecture
    assert isinstance(encoder, ViTConfig)
    assert (encoder.patch_size, encoder.width, encoder.depth, encoder.heads) == (4, 96, 3, 3)
    assert (encoder.registers, encoder.stem) == (2, "conv")
    resnet, _ = choose(settings("simclr", init=Path("there")), PHOTOS, LAPTOP, ResNetConfig(32, 18, "imagenet"))
    assert resnet.architecture == ResNetConfig(64, 18, "imagenet")
    with pytest.raises(InvalidRequest, match="stem"):
        choose(settings("mae", init=Path("there")), PHOTOS, LAPTOP, start)


def test_a_run_goes_on_with_what_was_picked(tmp_path: Path) -> None:
    first, _ = choose(settings("dino", depth=2), PHOTOS, LAPTOP)
    open_run(tmp_path, config_of(first))
    again = from_run(settings("dino"), tomllib.loads((tmp_path / "config.toml").read_text()))
    assert again.model_dump() == first.model_dump()
    open_run(tmp_path, config_of(again))  # the same run
    changed = from_run(settings("dino", lr=0.5), read_config(tmp_path))
    assert (changed.lr, changed.epochs) == (0.5, first.epochs)
    other = settings("simclr")
    assert from_run(other, read_config(tmp_path)) == other


def test_fill_reads_the_run_or_the_data(tmp_path: Path) -> None:
    given = SETTINGS["mae"](data=[str(SAMPLES)], image_size=16, patch_size=8, width=16, depth=1, heads=1)
    first, lines = fill(given, tmp_path, CPU)
    assert first.batch_size == 32  # a quarter of 200, and a power of two
    assert any(line.startswith("epochs") for line in lines)
    open_run(tmp_path, config_of(first))
    missing = given.model_copy(update={"data": ["not there any more"]})
    again, lines = fill(missing, tmp_path, CPU)
    assert again.model_copy(update={"data": first.data}) == first
    assert len(lines) == 1


@pytest.mark.parametrize("objective", ["mae", "simclr", "dino", "swav", "autoencoder"])
def test_the_sample_photos_can_be_trained_on(objective: str) -> None:
    given = SETTINGS[objective](data=[str(SAMPLES)], device="cpu", precision="fp32")
    chosen, _ = choose(given, survey([read_dataset(SAMPLES)]), LAPTOP)
    assert (chosen.image_size, chosen.stored_size) == (64, 96)
    images = load_images(chosen.data, chosen.pixels_kept, 8, Console(file=io.StringIO()))
    torch.manual_seed(0)
    updater = Updater(build(chosen), chosen, CPU, torch.float32, 100, 10)
    before = [p.clone() for p in updater.objective.kept.parameters()]
    values = updater.update(images.pixels, 50)
    assert "skipped" not in values
    assert values["loss"] > 0
    after = list(updater.objective.kept.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
