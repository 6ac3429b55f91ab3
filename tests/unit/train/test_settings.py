import re
import subprocess
import sys
from pathlib import Path

import pytest

from patchsight_train.objective_settings import SETTINGS

RECIPES = sorted((Path(__file__).resolve().parents[3] / "train" / "recipes").glob("*.toml"))


def refused(capsys: pytest.CaptureFixture[str], objective: str, *arguments: str) -> str:
    """What is said on stderr; the exit status is 2."""
    with pytest.raises(SystemExit) as caught:
        SETTINGS[objective].from_command_line(f"patchsight-train {objective}", arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_setting_and_a_report(recipe: Path) -> None:
    text = recipe.read_text()
    command = re.search(rf"patchsight-train (\w+) --config train/recipes/{recipe.name}", text)
    assert command, "its header does not give the command"
    for fact in ("Hardware:", "Time:", "Expected", "Measured"):
        assert fact in text
    settings = SETTINGS[command[1]].from_command_line("test", ["--config", str(recipe), "--data", "somewhere"])
    assert settings.dataset
    assert settings.license != "unstated"


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("objective", SETTINGS)
def test_an_unknown_recipe_key_is_named_with_the_known_ones(
    objective: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('data = ["x"]\nlearning_rate = 0.1\n')
    said = refused(capsys, objective, "--config", str(recipe))
    assert said.startswith(f"patchsight-train {objective}: error: ")
    assert "unknown setting 'learning_rate'; the settings are backbone, batch_size, " in said
    assert ", lr, " in said


def test_a_key_of_another_objective_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("mask_ratio = 0.5\n")
    assert "unknown setting 'mask_ratio'" in refused(capsys, "dino", "--config", str(recipe), "--data", "x")
    assert SETTINGS["mae"].from_command_line("test", ["--config", str(recipe), "--data", "x"])


@pytest.mark.parametrize(
    ("objective", "arguments", "said"),
    [
        ("mae", [], "data is needed: --data"),
        ("mae", ["--lr=0"], "lr: Input should be greater than 0 (got '0')"),
        ("mae", ["--epochs=many"], "epochs: Input should be a valid integer"),
        ("mae", ["--image-size=30"], "image_size 30 is not a multiple of patch_size 4"),
        ("mae", ["--width=50", "--heads=3"], "width 50 is not a multiple of heads 3"),
        (
            "simclr",
            ["--backbone=vit-huge"],
            "backbone: Input should be 'vit-tiny', 'vit-small', 'vit-base', 'resnet18'",
        ),
        ("simclr", ["--backbone=resnet18", "--depth=3"], "resnet18 has no depth"),
        ("simclr", ["--backbone=resnet18", "--stem=conv"], "resnet18 has no stem 'conv'"),
        ("simclr", ["--stem=cifar"], "vit-tiny has no stem 'cifar'; its stems are patch and conv"),
        ("simclr", ["--stored-size=16"], "stored_size 16 is less than image_size 32"),
        ("simclr", ["--micro-batch=0"], "micro_batch: Input should be greater than 0"),
        ("simclr", ["--registers=-1"], "registers: Input should be greater than or equal to 0"),
        ("simclr", ["--batch-size=1"], "batch_size: Input should be greater than or equal to 2"),
        ("simclr", ["--stem=conv", "--patch-size=1"], "patch_size 1 is no power of 2"),
        ("simclr", ["--stem=conv", "--patch-size=6", "--image-size=36"], "patch_size 6 is no power of 2"),
        ("simclr", ["--crop-scale=0.5,0.2"], "0 < least <= largest <= 1"),
        ("simclr", ["--crop-scale=0,1"], "0 < least <= largest <= 1"),
        ("dino", ["--crop-scale=0.4,1.5"], "0 < least <= largest <= 1"),
        ("dino", ["--precision=fp16"], "precision: Input should be 'auto', 'fp32' or 'bf16'"),
    ],
)
def test_bad_values_are_refused_with_their_limit(
    objective: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if not arguments else ["--data=x"]
    assert said in refused(capsys, objective, *data, *arguments)


def test_a_recipe_that_is_missing_or_broken_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "missing.toml" in refused(capsys, "mae", "--config", str(tmp_path / "missing.toml"))
    (tmp_path / "broken.toml").write_text("lr = \n")
    assert "Invalid value" in refused(capsys, "mae", "--config", str(tmp_path / "broken.toml"))


def test_flags_win_over_environment_over_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('data = ["recipe"]\nepochs = 1\nbatch_size = 10\nseed = 100\n')
    monkeypatch.setenv("PATCHSIGHT_TRAIN_EPOCHS", "2")
    monkeypatch.setenv("PATCHSIGHT_TRAIN_BATCH_SIZE", "20")
    found = SETTINGS["mae"].from_command_line("test", ["--config", str(recipe), "--epochs=3"])
    assert (found.epochs, found.batch_size, found.seed, found.data) == (3, 20, 100, ["recipe"])


@pytest.mark.parametrize("arguments", [["--help"], ["simclr", "--help"], ["mae", "--lr=0"]], ids=" ".join)
def test_help_and_mistakes_answer_without_torch(arguments: list[str]) -> None:
    script = (
        "import sys; from patchsight_train.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('loaded:', 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded: False\n")
    assert "--data" in done.stdout or "lr: Input should be greater than 0" in done.stderr
