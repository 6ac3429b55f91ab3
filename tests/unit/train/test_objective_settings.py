from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from patchsight_train.architecture import ResNetConfig, ViTConfig
from patchsight_train.objective_settings import SETTINGS, SimCLRSettings
from patchsight_train.settings import MultiCrop, TrainSettings

MULTI_CROP = sorted(name for name, settings in SETTINGS.items() if issubclass(settings, MultiCrop))


def chosen(objective: str, **values: Any) -> TrainSettings:
    needed = {"teacher": "somewhere"} if "teacher" in SETTINGS[objective].model_fields else {}
    return SETTINGS[objective](**{"data": ["unread"], **needed, **values})


@pytest.mark.parametrize("objective", SETTINGS)
def test_every_objective_has_settings_that_fit_together(objective: str) -> None:
    found = chosen(objective)
    assert found.objective == objective
    assert isinstance(found.architecture, ViTConfig)


def test_each_objective_has_its_own_name() -> None:
    assert len({settings.objective for settings in SETTINGS.values()}) == len(SETTINGS)


@pytest.mark.parametrize(
    ("objective", "values", "said"),
    [
        ("mae", {"stem": "conv"}, "Input should be 'patch'"),
        ("mae", {"mask_ratio": 1}, "less than 1"),
        ("mae", {"mask_ratio": 0}, "greater than 0"),
        ("mae", {"width": 186, "heads": 3}, "width 186 must be a multiple of 4"),
        ("mae", {"decoder_width": 30}, "decoder_width 30 must be a multiple of 4 and of decoder_heads 4"),
        ("mae", {"decoder_width": 64, "decoder_heads": 3}, "decoder_width 64 must be .* of decoder_heads 3"),
        ("autoencoder", {"decoder_width": 6, "decoder_heads": 2}, "decoder_width 6 must be a multiple of 4"),
        ("skip_autoencoder", {"decoder_width": 6, "decoder_heads": 2}, "decoder_width 6 must be a multiple of 4"),
        ("autoencoder", {"bottleneck": 0}, "greater than 0"),
        ("mae", {"backbone": "resnet18"}, "mae needs a Vision Transformer, not resnet18"),
        ("skip_autoencoder", {"backbone": "resnet50"}, "skip_autoencoder needs a Vision Transformer, not resnet50"),
        ("simclr", {"temperature": 0}, "greater than 0"),
        ("simclr", {"projection_layers": 4}, "Input should be 2 or 3"),
        ("simclr", {"gray": 1.1}, "less than or equal to 1"),
        ("dino", {"local_size": 10}, "local_size 10 is not a multiple of patch_size 4"),
        ("dino", {"local_crops": -1}, "greater than or equal to 0"),
        ("dino", {"teacher_momentum": 1.5}, "less than or equal to 1"),
        ("dino", {"teacher_temperature": 0}, "greater than 0"),
        ("swav", {"local_size": 10}, "local_size 10 is not a multiple of patch_size 4"),
        ("swav", {"epsilon": 0}, "greater than 0"),
        ("swav", {"sinkhorn_iterations": 0}, "greater than 0"),
        ("swav", {"local_scale": (0.5, 0.2)}, "0 < least <= largest <= 1"),
    ],
)
def test_what_no_objective_can_use_is_refused(objective: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        chosen(objective, **values)


def test_a_number_of_a_few_comes_from_the_command_line_too() -> None:
    simclr = SETTINGS["simclr"].from_command_line("x", ["--data", "unread", "--projection-layers", "3"])
    assert isinstance(simclr, SimCLRSettings)
    assert simclr.projection_layers == 3


@pytest.mark.parametrize("objective", ["distillation", "soft_targets"])
def test_students_need_a_teacher(objective: str) -> None:
    with pytest.raises(ValidationError, match="teacher"):
        SETTINGS[objective](data=["unread"])


@pytest.mark.parametrize("objective", ["autoencoder", "simclr", "dino", "swav", "distillation", "soft_targets"])
@pytest.mark.parametrize(("backbone", "depth"), [("resnet18", 18), ("resnet50", 50)])
def test_the_others_admit_resnets(objective: str, backbone: str, depth: int) -> None:
    assert chosen(objective, backbone=backbone).architecture == ResNetConfig(32, depth, "cifar")  # type: ignore[arg-type]
    assert chosen(objective, backbone=backbone, image_size=96).architecture == ResNetConfig(96, depth, "imagenet")  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", MULTI_CROP)
@pytest.mark.parametrize(
    ("values", "pixels"),
    [
        ({"image_size": 32, "patch_size": 4}, 16),
        ({"image_size": 224, "patch_size": 16}, 112),
        ({"image_size": 96, "patch_size": 32}, 64),  # in whole patches
        ({"image_size": 16, "patch_size": 16}, 16),
        ({"image_size": 224, "patch_size": 16, "local_size": 96}, 96),
        ({"image_size": 50, "backbone": "resnet18"}, 25),
        ({"image_size": 50, "backbone": "resnet18", "local_size": 19}, 19),
    ],
)
def test_local_views_are_half_as_large_unless_told(objective: str, values: dict[str, Any], pixels: int) -> None:
    found = chosen(objective, **values)
    assert isinstance(found, MultiCrop)
    assert found.local_pixels == pixels


def test_multi_crop_is_of_dino_and_swav() -> None:
    assert MULTI_CROP == ["dino", "swav"]


@pytest.mark.parametrize(
    ("objective", "of_the_paper"),
    [
        ("mae", {"mask_ratio": 0.75, "normalize_pixels": True, "crop_scale": (0.2, 1.0), "beta2": 0.95}),
        ("simclr", {"projection_layers": 2, "projection_width": 128, "projection_hidden": 2048, "gray": 0.2}),
        ("dino", {"student_temperature": 0.1, "teacher_momentum": 0.996, "center_momentum": 0.9, "bottleneck": 256,
                  "head_hidden": 2048, "weight_decay": 0.04, "final_weight_decay": 0.4, "freeze_last_layer_epochs": 1,
                  "teacher_temperature": 0.04, "local_scale": (0.05, 0.4), "crop_scale": (0.4, 1.0)}),
        ("swav", {"temperature": 0.1, "epsilon": 0.05, "sinkhorn_iterations": 3, "projection_width": 128,
                  "projection_hidden": 2048, "freeze_prototypes_epochs": 1, "local_crops": 6}),
    ],
)  # fmt: skip
def test_defaults_are_those_of_the_papers(objective: str, of_the_paper: dict[str, Any]) -> None:
    found = chosen(objective)
    assert {name: getattr(found, name) for name in of_the_paper} == of_the_paper


def test_settings_cannot_be_changed(settings: Callable[..., TrainSettings]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        settings("dino").lr = 1.0  # type: ignore[misc]
