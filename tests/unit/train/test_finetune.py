"""The command `patchsight-finetune`, from its arguments to `result.json`."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from patchsight_export.source import read_run
from patchsight_train import checkpoint
from patchsight_train.finetune import main
from patchsight_train.finetune_settings import FineTuneSettings
from patchsight_train.initial import read_encoder
from patchsight_train.run import read_config

SHIPPED = Path(__file__).resolve().parents[3] / "model_repository" / "simclr-vit-cifar10"
TINY = [
    "--image-size=16", "--patch-size=4", "--width=16", "--depth=2", "--heads=2", "--batch-size=4", "--stored-size=20",
    "--device=cpu", "--precision=fp32", "--threads=1", "--lr=0.003",
]  # fmt: skip
SCRATCH = ["--scratch", *TINY]


@pytest.fixture
def tune(picture_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """`tune("run", …)`: on twelve pictures of cats and dogs, which are the test images too."""

    def tune(run: str, *arguments: str) -> Path:
        main([f"--data={picture_folder}", f"--test={picture_folder}", f"--run={tmp_path / run}", *arguments])
        return tmp_path / run

    return tune


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text())
    return found


def files_of(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoints" / str(max(checkpoint.complete(run)))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fails(capsys: pytest.CaptureFixture[str], *arguments: str, status: int) -> str:
    """What is said on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == status
    return capsys.readouterr().err


def test_a_run_leaves_its_result(
    tune: Callable[..., Path], picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tune("run", *SCRATCH, "--epochs=2", "--labels=0.5", f"--val={picture_folder}", "--blocks=1")
    names = ["checkpoints", "config.toml", "metrics.jsonl", "pictures", "report.html", "result.json", "time.json"]
    assert sorted(path.name for path in run.iterdir()) == names
    found = result(run)
    assert found["test_images"] == 12
    assert found["labelled_images"] == 6
    assert found["steps"] == 2
    assert found["interval_95"][0] <= found["top1"] == found["val_top1"] <= found["interval_95"][1]
    D = 16
    block = 4 * D * D + 4 * D + 8 * D * D + 5 * D + 4 * D
    assert found["trained_parameters"] == block + 2 * D + 2 * D + 2
    assert found["trained_parameters"] < found["parameters"]
    assert {name: of["images"] for name, of in found["per_class"].items()} == {"cats": 6, "dogs": 6}
    assert found["wall_minutes"] > 0
    assert found["cpu_minutes"] > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["accuracy"] == found["top1"]
    assert {"loss", "lr", "batch_accuracy"} <= lines[0].keys()
    said = capsys.readouterr().out
    assert "6 of 12 labelled images: 3 of each of 2 classes" in said
    assert "top-1" in said
    assert "accuracy" in said


def test_the_same_command_again_changes_nothing_but_another_is_refused(
    tune: Callable[..., Path], picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tune("run", *SCRATCH, "--epochs=1")
    before = result(run), files_of(run)
    assert (result(tune("run", *SCRATCH, "--epochs=1")), files_of(run)) == before
    sides = [f"--data={picture_folder}", f"--test={picture_folder}", f"--run={tmp_path / 'run'}"]
    said = fails(capsys, *sides, *SCRATCH, "--epochs=1", "--blocks=1", status=1)
    assert "holds another run (blocks was 'all', is now 1.0)" in said


def test_from_scratch_and_pretrained_share_the_architecture(tune: Callable[..., Path]) -> None:
    source = tune("source", *SCRATCH, "--epochs=1", "--pooling=mean")
    init = [f"--init={source}", "--epochs=1", "--batch-size=4", "--device=cpu", "--threads=1", "--lr=1e-12"]
    pretrained, scratch = tune("pretrained", *init), tune("scratch", *init, "--scratch")
    ours, theirs, first = (read_encoder(run)[0] for run in (pretrained, scratch, source))
    assert ours.config == theirs.config == first.config
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    torch.testing.assert_close(ours.state_dict(), first.state_dict())  # nothing was learned at this rate
    assert not torch.allclose(theirs.get_parameter("pos_embed"), first.get_parameter("pos_embed"))
    configs = [read_config(run) for run in (pretrained, scratch)]
    assert [config["pooling"] for config in configs] == ["mean", "mean"]
    assert read_run(pretrained).manifest("x", "0" * 64).recommended == "mean"  # for export
    assert [config["layer_decay"] for config in configs] == [0.75, 1.0]
    assert [result(run)["scratch"] for run in (pretrained, scratch)] == [False, True]


def test_strange_sides_are_survived(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three test images, of which one is of a class that is not trained; and a training image that is broken."""
    test = tmp_path / "few"
    for name, source in (("dogs/0.png", "dogs/00.png"), ("emus/0.png", "cats/05.png")):
        (test / name).parent.mkdir(parents=True)
        shutil.copy(picture_folder / source, test / name)
    (picture_folder / "cats" / "03.png").write_bytes(b"no image")
    arguments = [f"--data={picture_folder}", f"--test={test}", f"--run={tmp_path / 'run'}", *SCRATCH, "--epochs=1"]
    # Cats are not tested and emus not trained: are they the same?
    assert "only --test has emus, only --data has cats" in fails(capsys, *arguments, status=1)
    (test / "cats").mkdir()
    Image.new("L", (9, 20), 99).save(test / "cats" / "gray.png")
    main(arguments)
    found = result(tmp_path / "run")
    assert (found["test_images"], found["labelled_images"]) == (3, 11)
    assert found["per_class"]["emus"] == {"accuracy": 0.0, "images": 1}
    said = capsys.readouterr().out
    assert "1 of 3 test images are of classes without a training image: counted as wrong" in said
    assert "skipped cats/03.png" in said


def test_killed_and_resumed_equals_never_killed(
    tune: Callable[..., Path], picture_folder: Path, tmp_path: Path, forked: Callable[[str], BaseProcess]
) -> None:
    """With mixup, batch norm and a part that is frozen: whatever has a state or draws random numbers."""
    own = [
        *SCRATCH,
        "--epochs=20",
        "--mixup=0.8",
        "--batch-norm",
        "--blocks=0.5",
        "--checkpoint-every=3",
        "--val-every=0",
    ]
    whole = tune("whole", *own)
    run, rng = tmp_path / "killed", random.Random(0)
    arguments = [f"--data={picture_folder}", f"--test={picture_folder}", f"--run={run}", *own]
    for _ in range(2):
        done = max(checkpoint.complete(run), default=0)
        process = forked(f"from patchsight_train.finetune import main\nmain({arguments!r})\n")
        while process.is_alive() and max(checkpoint.complete(run), default=0) <= done:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
    assert 0 < max(checkpoint.complete(run)) < 60
    main(arguments)
    assert files_of(run) == files_of(whole)
    timeless = [{k: v for k, v in result(x).items() if not k.endswith("minutes")} for x in (run, whole)]
    assert timeless[0] == timeless[1]


@pytest.mark.data
def test_few_real_pictures_are_learned(data: Path, tmp_path: Path) -> None:
    """By one block of the encoder that ships, of 60 labelled pictures of each class; one in ten would be chance."""
    table = pq.read_table(data / "cifar10" / "test.parquet")
    pq.write_table(table.slice(0, 2000), tmp_path / "train.parquet")
    pq.write_table(table.slice(2000, 300), tmp_path / "test.parquet")
    sides = [f"--data={tmp_path / 'train.parquet'}", f"--test={tmp_path / 'test.parquet'}"]
    main([f"--init={SHIPPED}", *sides, "--labels=0.3", "--blocks=0.5", "--epochs=4", "--batch-size=50", "--lr=2e-3",
          f"--run={tmp_path / 'run'}", "--device=cpu", "--threads=1", "--val-every=0"])  # fmt: skip
    found = result(tmp_path / "run")
    assert found["labelled_images"] == 600
    assert found["interval_95"][0] > 0.4


def test_mistakes_are_explained(picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [f"--data={picture_folder}", f"--test={picture_folder}"]
    for wrong, message, status in (
        ([*sides], "an encoder is needed: --init RUN_OR_BUNDLE; or --scratch", 2),
        ([sides[0], "--scratch"], "test is needed: --test", 2),
        ([*sides, "--scratch", "--blocks=1.5"], "blocks 1.5 is neither all, nor 0.5, nor a whole number", 2),
        ([*sides, "--scratch", "--blocks=-1"], "blocks -1 is neither", 2),
        ([*sides, "--scratch", "--labels=0"], "labels: Input should be greater than 0", 2),
        ([*sides, *SCRATCH, "--blocks=3"], "--blocks 3: the encoder has 2 blocks", 1),
        ([*sides, "--scratch", "--backbone=resnet18", "--blocks=1"], "--blocks 1: of a ResNet all is trained", 1),
        ([*sides, f"--init={tmp_path}"], "neither a run folder (config.toml) nor a bundle", 1),
        ([*sides, "--scratch", f"--val={tmp_path / 'nothing'}"], "no such folder", 1),
    ):
        assert message in fails(capsys, *wrong, status=status)
    assert not Path("runs").exists()


def test_blocks_are_all_or_a_number(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('[finetune]\ndata = ["x"]\ntest = ["x"]\nscratch = true\nblocks = 0.5\n')
    read = [FineTuneSettings.from_command_line("x", [f"--config={path}", *more]) for more in ([], ["--blocks", "all"])]
    assert [settings.blocks for settings in read] == [0.5, "all"]
    assert FineTuneSettings.from_command_line("x", [f"--config={path}", "--blocks=2"]).blocks == 2


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, patchsight_train.finetune as f\n"
        "try: f.main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith("False\n")
    assert "--layer-decay" in said
    assert "--knn-test" not in said
