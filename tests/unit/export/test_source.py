"""The encoder that a run keeps, and what its manifest says."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from patchsight_export.source import OBJECTIVES, describe, read_run
from patchsight_serve.errors import InvalidRequest
from patchsight_train.architecture import ViTConfig
from patchsight_train.run import config_of, read_config
from patchsight_train.settings import SETTINGS, SimCLRSettings


def test_every_objective_can_be_exported() -> None:
    assert OBJECTIVES.keys() == SETTINGS.keys()


@pytest.mark.parametrize(("name", "pooling"), [("mae", "mean"), ("simclr", "cls"), ("dino", "cls")])
def test_the_kept_encoder_is_rebuilt(
    name: str, pooling: str, make_run: Callable[..., torch.nn.Module], tmp_path: Path
) -> None:
    objective = make_run(tmp_path, name)
    source = read_run(tmp_path)
    kept = objective.kept.state_dict()
    found = source.encoder.state_dict()
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[key], kept[key]) for key in kept)
    assert not source.encoder.training
    manifest = source.manifest("x", "0" * 64)
    assert manifest.recommended == pooling
    assert manifest.objective == name
    assert manifest.parameters == sum(value.numel() for value in kept.values())


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


def test_description_of_the_shipped_architecture() -> None:
    assert describe(ViTConfig(width=128, depth=4, heads=4, stem="conv")) == "ViT 128×4, 4 heads, patch 4, conv stem"


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


def test_the_environment_changes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHSIGHT_TRAIN_WIDTH", "48")
    assert read_run(run).encoder.config.width == 24


def test_newest_or_chosen_step(make_run: Callable[..., torch.nn.Module], tmp_path: Path) -> None:
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
        ("depth = 3\n", "", "depth is missing"),
        ('objective = "simclr"', 'objective = "jigsaw"', "objective is 'jigsaw', not one of mae, simclr, dino"),
        ("depth = 3", "depth = = 3", r"config\.toml: Invalid value"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit(
    old: str, new: str, message: str, make_run: Callable[..., torch.nn.Module], tmp_path: Path
) -> None:
    make_run(tmp_path)
    config = tmp_path / "config.toml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(InvalidRequest, match=message):
        read_run(tmp_path)
