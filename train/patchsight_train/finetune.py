"""`patchsight-finetune --init SOURCE --data TRAIN --test TEST`: parse, wire, run. On several devices by `torchrun`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patchsight_serve.config import fail
from patchsight_serve.errors import PatchsightError
from patchsight_train.finetune_settings import FineTuneSettings

if TYPE_CHECKING:
    from rich.console import Console

    from patchsight_train.classification import Classification
    from patchsight_train.labelled import Labelled

PROG = "patchsight-finetune"
SHOWN = 512  # training images that pictures are made of


def main(argv: Sequence[str] | None = None) -> None:
    """Exits with 2 on a wrong setting, 1 if the work fails; 130 by Ctrl-C, after a checkpoint."""
    settings = FineTuneSettings.from_command_line(PROG, sys.argv[1:] if argv is None else argv)
    try:
        finetune(settings)
    except PatchsightError as error:
        fail(PROG, error.message, status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def finetune(settings: FineTuneSettings) -> Path:
    """Run, or resume, what `settings` describe; gives the run folder, with `result.json`."""
    from patchsight_train import distributed  # torch: after parsing, so that --help and mistakes answer at once
    from patchsight_train.finetune_defaults import fill
    from patchsight_train.finetune_loop import FineTuner, Validation, sample
    from patchsight_train.finetune_result import conclude
    from patchsight_train.hazards import explained
    from patchsight_train.labelled import open_judging, open_training
    from patchsight_train.opening import announce, begin
    from patchsight_train.run import config_of, open_run
    from patchsight_train.stopwatch import Stopwatch

    run = settings.run or Path("runs") / settings.objective
    stopwatch = Stopwatch(run)
    device, leader, console = begin(settings)
    with explained(run):
        every = open_training(settings.data, settings.limit)
        train = every.drawn(settings.labels, settings.seed)
        test = open_judging(settings.test, "--test", every)
        val = open_judging(settings.val, "--val", every) if settings.val else None
        settings, picked = fill(settings, len(train.rows), run, device)
        announce(console, PROG, run, settings, picked)
        _count(console, every, train, test)
        images = train.decode(settings.pixels_kept, console)
        queries = test.decode(settings.image_size, console)
        watched = val.decode(settings.image_size, console) if val else None
        if leader:
            open_run(run, config_of(settings))
        evaluation = Validation(sample(images, SHOWN), None, run, watched) if settings.val_every and leader else None
        objective = _classification(settings, every.classes, run, console)
        tuner = FineTuner(objective, images, evaluation, settings, run, console, stopwatch)
        tuner.train()
        if leader:
            conclude(tuner, images, queries, watched)
    distributed.stop()
    return run


def _classification(settings: FineTuneSettings, classes: int, run: Path, console: "Console") -> "Classification":
    """The encoder with its first weights, and a new classifier."""
    import torch

    from patchsight_train import checkpoint
    from patchsight_train.build import build_encoder
    from patchsight_train.classification import Classification
    from patchsight_train.initial import initialize
    from patchsight_train.opening import PLAIN

    torch.manual_seed(settings.seed)
    objective = Classification(build_encoder(settings.architecture), classes, settings)
    begins = not checkpoint.complete(run)  # later on the weights are those of the checkpoint
    for line in initialize(objective, settings.init) if settings.init and not settings.scratch and begins else []:
        console.print(line, **PLAIN)
    return objective


def _count(console: "Console", every: "Labelled", train: "Labelled", test: "Labelled") -> None:
    """How many labels there are, and which test images cannot be classified rightly."""
    import torch

    from patchsight_train.opening import PLAIN

    classes, counts = torch.unique(train.labels, return_counts=True)
    least, most = int(counts.min()), int(counts.max())
    each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    of = f"{len(train.rows):,} of {len(every.rows):,} labelled images"
    console.print(f"{of}: {each} of each of {len(classes):,} classes", **PLAIN)
    known = set(classes.tolist())
    foreign = sum(label not in known for label in test.labels.tolist())
    if foreign:
        what = f"{foreign:,} of {len(test.rows):,} test images are of classes without a training image"
        console.print(f"{what}: counted as wrong", **PLAIN)


if __name__ == "__main__":
    main()
