from pathlib import Path

import pytest

from patchsight_train import checkpoint
from patchsight_train.__main__ import USAGE, main
from patchsight_train.build import build
from patchsight_train.dino import DINO
from patchsight_train.mae import MAE
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.run import read_config
from patchsight_train.simclr import SimCLR

TINY = ["--image-size=16", "--width=16", "--depth=1", "--heads=2", "--batch-size=4", "--epochs=1", "--device=cpu"]


TEACHER = f"--teacher={Path(__file__).resolve().parents[3] / 'model_repository' / 'simclr-vit-cifar10'}"
HEADS = {
    "simclr": ["--projection-hidden=32"],
    "dino": ["--prototypes=32", "--head-hidden=32", "--local-crops=1"],
    "swav": ["--prototypes=32", "--projection-hidden=32", "--local-crops=1"],
    "distillation": [TEACHER],
    "soft_targets": [TEACHER],
}


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, status: int) -> str:
    """What is said on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == status
    return capsys.readouterr().err


@pytest.mark.parametrize("objective", SETTINGS)
def test_trains_and_leaves_a_run_folder(
    objective: str, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    main([objective, f"--data={picture_folder}", f"--run={run}", *TINY, *HEADS.get(objective, []), "--knn-every=1"])
    left = ["checkpoints", "config.toml", "metrics.jsonl", "pictures", "report.html"]
    assert sorted(p.name for p in run.iterdir()) == left
    assert checkpoint.complete(run) == [3]
    assert read_config(run)["objective"] == objective
    said = capsys.readouterr().out
    assert "picked:" in said
    assert "kept in memory" in said
    assert "20-NN" in said


def test_the_default_run_folder_is_named_after_the_objective(picture_folder: Path) -> None:
    main(["mae", f"--data={picture_folder}", *TINY])
    assert Path("runs/mae/checkpoints/3").is_dir()


def test_a_changed_setting_is_refused(picture_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["mae", f"--data={picture_folder}", *TINY])
    said = fails(capsys, "mae", f"--data={picture_folder}", *TINY, "--mask-ratio=0.5", status=1)
    assert said.startswith(
        "patchsight-train mae: error: runs/mae holds another run (mask_ratio was 0.75, is now 0.5); "
    )
    assert said.endswith("choose another --run, or delete that folder\n")


def test_failures_say_what_is_wrong_and_leave_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_bytes(b"no image")
    for name, said in [("missing", "no such folder"), ("empty", "no image in this"), ("bad", "none of 1 images")]:
        assert said in fails(capsys, "mae", f"--data={tmp_path / name}", *TINY, status=1)
    assert not Path("runs").exists()


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert capsys.readouterr().out == USAGE + "\n"
    assert fails(capsys, status=2) == fails(capsys, "moco", status=2) == USAGE + "\n"
    assert "data is needed: --data" in fails(capsys, "dino", status=2)


@pytest.mark.parametrize(("objective", "kind"), [("mae", MAE), ("simclr", SimCLR), ("dino", DINO)])
def test_build_follows_the_settings(objective: str, kind: type) -> None:
    settings = SETTINGS[objective](data=["x"], image_size=24, patch_size=8, width=24, depth=2, heads=2, registers=3)
    built = build(settings)
    assert type(built) is kind
    config = built.kept.config
    found = (config.image_size, config.patch_size, config.width, config.depth, config.heads, config.registers)
    assert found == (24, 8, 24, 2, 2, 3)
    assert built.pooling == ("mean" if objective == "mae" else "cls")
