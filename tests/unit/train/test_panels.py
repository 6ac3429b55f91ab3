import math
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from patchsight_train.history import Curve, History
from patchsight_train.mae import masked_pixel_loss
from patchsight_train.panels import references, sections
from patchsight_train.simclr import nt_xent

SIMCLR = {"objective": "simclr", "batch_size": 16, "backbone": "vit-tiny", "image_size": 32, "patch_size": 4}


def history(step: int = 200, epoch: float = 2.0, **values: float) -> History:
    """Each metric at each step with the same value."""
    steps = np.arange(1.0, step + 1)
    return History({name: Curve(steps, np.full(step, float(x))) for name, x in values.items()}, [], step, epoch)


def values_of(name: str, config: dict[str, Any]) -> list[float]:
    return [reference.value for reference in references(history(), config).get(name, [])]


def test_chance_of_simclr_is_what_equal_similarities_give() -> None:
    loss, _ = nt_xent(torch.ones(32, 8), 0.2)
    assert values_of("loss", SIMCLR) == [pytest.approx(float(loss), rel=1e-6)]
    assert values_of("contrastive_accuracy", SIMCLR) == [pytest.approx(100 / 31)]


def test_a_batch_of_unknown_size_has_no_chance_level() -> None:
    """Where an epoch is one step, there may have been fewer images than the batch was to have."""
    assert "loss" not in references(history(step=2, epoch=2.0), SIMCLR)


@pytest.mark.parametrize("objective", ["dino", "swav"])
def test_uniform_prototypes_have_the_entropy_ln_k(objective: str) -> None:
    config = {"objective": objective, "prototypes": 4096}
    uniform = -float(torch.special.xlogy(torch.full((4096,), 1 / 4096), torch.full((4096,), 1 / 4096)).sum())
    assert values_of("loss", config) == [pytest.approx(uniform, rel=1e-5)]
    for name in ("teacher_entropy", "code_entropy"):
        assert values_of(name, config) == [pytest.approx(uniform, rel=1e-5), 0.0]


@pytest.mark.parametrize("patch_size", [2, 4, 16])
def test_level_of_mae_is_what_each_patch_s_mean_gives(patch_size: int) -> None:
    target = torch.rand(64, 9, 3 * patch_size**2, generator=torch.Generator().manual_seed(1))
    loss = masked_pixel_loss(torch.zeros_like(target), target, torch.ones(64, 9), normalize_pixels=True)
    config = {"objective": "mae", "normalize_pixels": True, "patch_size": patch_size}
    assert values_of("loss", config) == [pytest.approx(float(loss), rel=1e-3)]
    assert values_of("loss", config | {"normalize_pixels": False}) == []


@pytest.mark.parametrize(
    ("config", "width"),
    [({"backbone": "vit-small"}, 384), ({"width": 128, "heads": 4, "depth": 4}, 128), ({"backbone": "resnet18"}, 512),
     ({"backbone": "resnet50"}, 2048), ({"backbone": "vit-huge"}, None), ({"backbone": 3}, None),
     ({"backbone": "vit-tiny", "patch_size": 5}, None)],
)  # fmt: skip
def test_rank_is_of_the_encoder_s_width(config: dict[str, Any], width: int | None) -> None:
    config = {"image_size": 32} | config
    assert values_of("rankme", config) == ([] if width is None else [width])


def titles(found: dict[str, str], heading: str) -> list[str]:
    root = ElementTree.fromstring(f"<x>{found[heading]}</x>")
    return [str(e.text) for e in root.iter("h3")]


def test_every_metric_has_its_chart() -> None:
    """Those that are known at their place, those of a new objective beside its loss."""
    names = (
        "loss", "lr", "weight_decay", "gradient_norm", "images_per_s", "knn", "linear_probe", "rankme", "alignment",
        "uniformity", "feature_std", "contrastive_accuracy", "teacher_momentum", "brand_new",
    )  # fmt: skip
    found = dict(sections(history(**dict.fromkeys(names, 0.5)), SIMCLR))
    assert list(found) == ["Objective", "Features", "Optimization"]
    assert titles(found, "Objective") == ["Loss", "Contrastive accuracy", "Brand new"]
    assert titles(found, "Features") == [
        "Classes from frozen features", "Effective rank", "Feature deviation", "Alignment and uniformity",
    ]  # fmt: skip
    assert titles(found, "Optimization") == [
        "Learning rate", "Weight decay", "Teacher momentum", "Gradient norm", "Speed",
    ]  # fmt: skip


def test_what_is_not_logged_has_no_chart() -> None:
    assert dict(sections(history(step=0, epoch=0.0), {})) == {}
    assert list(dict(sections(history(lr=1e-3), {}))) == ["Optimization"]
    found = dict(sections(history(loss=1.0, rankme=3.0), SIMCLR))
    assert titles(found, "Features") == ["Effective rank"]
    assert "Objective" not in dict(sections(history(loss=math.nan), SIMCLR))


def test_shares_are_drawn_in_percent() -> None:
    found = dict(sections(history(knn=0.581), SIMCLR))["Features"]
    assert ElementTree.fromstring(f"<x>{found}</x>").findtext(".//output") == "58.1 %"


def test_warnings_and_skipped_steps_are_marked_in_the_loss() -> None:
    logged = history(loss=1.0)
    logged.curves["skipped"] = Curve(np.array([50.0]), np.array([1.0]))
    logged.warnings.append((100, "the rank falls"))
    found = dict(sections(logged, SIMCLR))["Objective"]
    marks = [e for e in ElementTree.fromstring(f"<x>{found}</x>").iter("line") if e.get("class") == "mark"]
    assert [(m.attrib["x1"], m.findtext("title")) for m in marks] == [
        ("50.000%", "epoch 1: the rank falls"), ("25.000%", "epoch 0.5: skipped, not finite"),
    ]  # fmt: skip
