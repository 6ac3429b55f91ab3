"""`patchsight-train OBJECTIVE --data …`: parse, wire, run. Under `torchrun` on several devices."""

import sys
from collections.abc import Sequence
from pathlib import Path

from patchsight_serve.config import fail
from patchsight_serve.errors import PatchsightError
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.settings import TrainSettings

SAMPLE = 2048  # images that the label-free measures look at
USAGE = """usage: patchsight-train OBJECTIVE --data SOURCE [settings]

  simclr            contrastive learning, arXiv:2002.05709
  dino              self-distillation with multi-crop, arXiv:2104.14294
  swav              swapped assignments with multi-crop, arXiv:2006.09882
  mae               masked autoencoder, arXiv:2111.06377
  autoencoder       the picture through a vector and back
  skip_autoencoder  the same with shortcuts around the vector
  distillation      the embeddings of an exported encoder, arXiv:1412.6550
  soft_targets      the classes of an exported encoder, arXiv:1503.02531

SOURCE is a folder of images or Parquet. patchsight-train OBJECTIVE --help lists the settings of each;
what is not given is picked by the data and the device, and said. Several GPUs:
torchrun --nproc-per-node N -m -- patchsight_train OBJECTIVE …"""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if not arguments or arguments[0] not in SETTINGS:
        print(USAGE, file=sys.stderr)
        raise SystemExit(2)
    prog = f"patchsight-train {arguments[0]}"
    settings = SETTINGS[arguments[0]].from_command_line(prog, arguments[1:])
    try:
        train(settings)
    except PatchsightError as error:
        fail(prog, error.message, status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def train(settings: TrainSettings) -> Path:
    """Run, or resume, what `settings` describe; gives the run folder."""
    import torch  # after parsing, so that --help and mistakes answer at once

    from patchsight_train import distributed
    from patchsight_train.build import build
    from patchsight_train.data import sample_images
    from patchsight_train.defaults import fill
    from patchsight_train.evaluation import Evaluation
    from patchsight_train.hazards import explained
    from patchsight_train.initial import initialize
    from patchsight_train.loop import Trainer
    from patchsight_train.opening import PLAIN, announce, begin
    from patchsight_train.probe import load_probe
    from patchsight_train.run import config_of, open_run
    from patchsight_train.stream import open_images

    run = settings.run or Path("runs") / settings.objective
    device, leader, console = begin(settings)
    with explained(run):
        settings, picked = fill(settings, run, device)
        announce(console, f"patchsight-train {settings.objective}", run, settings, picked)
        images = open_images(settings.data, settings.pixels_kept, settings.limit, console, settings.resident)
        probe = evaluation = None
        if settings.knn_every and leader:
            size = settings.image_size
            probe = load_probe(
                settings.data, settings.knn_test, size, settings.knn_gallery, settings.knn_queries, console,
                settings.limit,
            )  # fmt: skip
            sample = sample_images(settings.data, settings.pixels_kept, SAMPLE, console, settings.limit)
            evaluation = Evaluation(sample, probe, run)
        if leader:
            open_run(run, config_of(settings))
        torch.manual_seed(settings.seed)
        objective = build(settings)
        for line in initialize(objective, settings.init) if settings.init else []:
            console.print(line, **PLAIN)
        trainer = Trainer(objective, images, evaluation, settings, run, console)
        trainer.train()
    distributed.stop()
    return run


if __name__ == "__main__":
    main()
