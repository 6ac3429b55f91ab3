"""The encoder that a run keeps, and what its manifest says."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from patchsight_export.source import describe, read_run
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_train.architecture import ResNetConfig, ViTConfig
from patchsight_train.initial import KEPT
from patchsight_train.objective import Objective
from patchsight_train.objective_settings import SETTINGS, SimCLRSettings
from patchsight_train.run import config_of, read_config
from patchsight_train.vit import ViT

WITH_TEACHER = ("distillation", "soft_targets")


def test_every_objective_can_be_exported() -> None:
    assert KEPT.keys() == {*SETTINGS, "finetune"}


@pytest.mark.parametrize(
    ("name", "backbone"), [*((name, "vit-tiny") for name in SETTINGS), ("simclr", "resnet18"), ("dino", "resnet18")]
)
def test_the_kept_encoder_is_rebuilt(
    name: str, backbone: str, make_run: Callable[..., Objective], bundle: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"teacher": bundle} if name in WITH_TEACHER else {}
    settings |= {"teacher_labels": [str(SAMPLES)]} if name == "soft_targets" else {}
    objective = make_run(tmp_path, name, backbone=backbone, **settings)
    source = read_run(tmp_path)
    kept = objective.kept.state_dict()
    found = source.encoder.state_dict()
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[key], kept[key]) for key in kept)
    assert not source.encoder.training
    manifest = source.manifest("x", "0" * 64)
    assert manifest.recommended == objective.pooling
    assert manifest.objective == name
    assert manifest.parameters == sum(value.numel() for value in objective.kept.parameters())


def test_manifest_fields(run: Path) -> None:
    manifest = read_run(run).manifest("tiny", "0" * 64)
    config = read_config(run)
    assert (manifest.image_size, manifest.patch_size, manifest.embedding_dim) == (16, 4, 24)
    assert (manifest.num_heads, manifest.prefix_tokens) == (2, 3)
    assert (manifest.transform.resize, manifest.transform.crop) == (16, 16)
    assert (manifest.data, manifest.license, manifest.commit) == ("noise", "CC0-1.0", config["commit"])
    assert manifest.architecture == "ViT 24×3, 2 heads, patch 4, 2 registers"
    assert manifest.measured == {}
    assert manifest.outputs["attention"] == (2, 4, 4)


def test_manifest_fields_of_a_resnet(resnet_run: Path) -> None:
    manifest = read_run(resnet_run).manifest("resnet", "0" * 64)
    assert (manifest.image_size, manifest.patch_size, manifest.embedding_dim) == (16, None, 512)
    assert (manifest.num_heads, manifest.prefix_tokens, manifest.recommended) == (None, 0, "mean")
    assert (manifest.transform.resize, manifest.transform.crop) == (16, 16)
    assert (manifest.architecture, manifest.parameters) == ("ResNet-18, cifar stem", 11_168_832)
    assert manifest.outputs == {"mean_embedding": (512,)}


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (ViTConfig(width=128, depth=4, heads=4, stem="conv"), "ViT 128×4, 4 heads, patch 4, conv stem"),
        (ResNetConfig(224, 50, "imagenet"), "ResNet-50, imagenet stem"),
    ],
)
def test_description(net: ViTConfig | ResNetConfig, told: str) -> None:
    assert describe(net) == told


def test_the_recipe_repeats_the_run(run: Path) -> None:
    """As a --config file it gives the settings that the run had, and it says nothing of the machine."""
    text = read_run(run).fields["recipe"]
    config = read_config(run)
    again = config_of(SimCLRSettings(data=config["data"], **tomllib.loads(text)))
    free = {"dataset", "license", "commit", "threads"}
    assert {k: v for k, v in again.items() if k not in free} == {k: v for k, v in config.items() if k not in free}
    assert text.splitlines()[0].startswith("# simclr, step 7 of the training; patchsight ")
    assert "nowhere" not in text
    assert "/" not in text


def test_the_recipe_names_what_it_began_from_without_its_folder(
    make_run: Callable[..., Objective], bundle: Path, tmp_path: Path
) -> None:
    make_run(tmp_path, "distillation", teacher=bundle, init="/home/somebody/runs/first")
    text = read_run(tmp_path).fields["recipe"]
    assert text.startswith("# distillation, step 7 of the training; init first; teacher tiny; patchsight ")
    assert "/" not in text


def test_the_environment_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHSIGHT_TRAIN_WIDTH", "48")
    assert read_run(run).encoder.config.width == 24


def test_a_run_of_before_there_were_backbones(run: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(run / "checkpoints")
    lines = (run / "config.toml").read_text().splitlines(keepends=True)
    (tmp_path / "config.toml").write_text("".join(line for line in lines if not line.startswith("backbone")))
    assert len(lines) > len((tmp_path / "config.toml").read_text().splitlines())
    assert isinstance(read_run(tmp_path).encoder, ViT)


def test_newest_or_chosen_step(make_run: Callable[..., Objective], tmp_path: Path) -> None:
    make_run(tmp_path, step=3)
    make_run(tmp_path, step=12)
    assert read_run(tmp_path).step == 12
    assert read_run(tmp_path, step=3).step == 3
    with pytest.raises(InvalidRequest, match=r"no checkpoint of step 4; there are \[3, 12\]"):
        read_run(tmp_path, step=4)


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"not a run folder, config\.toml is missing"):
        read_run(tmp_path / "absent")


def test_no_checkpoint_yet(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes((run / "config.toml").read_bytes())
    with pytest.raises(InvalidRequest, match="no checkpoint"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width = 24", "width = 32", r"another architecture than .*size mismatch for cls_token"),
        ("depth = 3", "depth = 4", r'another architecture than .*Missing key\(s\).*blocks\.3'),
        ("width = 24", "width = 23", "width 23 is not a multiple of heads 2"),
        ("depth = 3\n", "", r'another architecture than .*Missing key\(s\).*blocks\.3'),
        ('objective = "simclr"', 'objective = "jigsaw"', "objective is 'jigsaw', not one of .*simclr, dino"),
        ("depth = 3", "depth = = 3", r"config\.toml: Invalid value"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit(
    old: str, new: str, message: str, make_run: Callable[..., Objective], tmp_path: Path
) -> None:
    make_run(tmp_path)
    config = tmp_path / "config.toml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(InvalidRequest, match=message):
        read_run(tmp_path)
