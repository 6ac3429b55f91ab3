"""`patchsight-train {mae,simclr,dino} --data …`: parse, wire, run."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patchsight_serve.config import fail
from patchsight_serve.errors import PatchsightError
from patchsight_train.settings import SETTINGS, DINOSettings, MAESettings, SimCLRSettings, TrainSettings

if TYPE_CHECKING:
    from patchsight_train.objective import Objective

USAGE = """usage: patchsight-train {mae,simclr,dino} --data SOURCE [settings]

  mae     Masked Autoencoder, arXiv:2111.06377
  simclr  contrastive learning, arXiv:2002.05709
  dino    self-distillation, arXiv:2104.14294

patchsight-train OBJECTIVE --help lists the settings of each."""


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
    from rich.console import Console

    from patchsight_train.data import load_images
    from patchsight_train.loop import Trainer
    from patchsight_train.probe import split_probe
    from patchsight_train.run import config_of, open_run

    console = Console()
    run = settings.run or Path("runs") / settings.objective
    console.print(
        f"patchsight-train {settings.objective} → {run}\n{settings.describe()}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    images = load_images(settings.data, settings.image_size, settings.limit, console)
    test = load_images(settings.knn_test, settings.image_size, None, console) if settings.knn_test else None
    open_run(run, config_of(settings))
    torch.manual_seed(settings.seed)
    probe = split_probe(images, test, settings.knn_gallery, settings.knn_queries)
    trainer = Trainer(build(settings), images, probe, settings, run, console)
    console.print(
        f"{len(images):,} images · {trainer.total_steps:,} steps of {settings.batch_size} · "
        f"{sum(p.numel() for p in trainer.objective.kept.parameters()) / 1e6:.2f} M parameters in the encoder · "
        f"{trainer.device}, {str(trainer.dtype).removeprefix('torch.')}"
    )
    trainer.train()
    return run


def build(settings: TrainSettings) -> "Objective":
    """The objective with its freshly initialized encoder."""
    from patchsight_train.dino import DINO
    from patchsight_train.mae import MAE
    from patchsight_train.simclr import SimCLR
    from patchsight_train.vit import ViT

    encoder = ViT(settings.architecture)
    match settings:
        case MAESettings():
            return MAE(encoder, settings)
        case SimCLRSettings():
            return SimCLR(encoder, settings)
        case DINOSettings():
            return DINO(encoder, settings)
        case _:
            raise TypeError(f"no objective for {type(settings).__name__}")


if __name__ == "__main__":
    main()
