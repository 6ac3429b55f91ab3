"""What the user leaves open about a fine-tuning: by the encoder it starts from, and by how many labels there are.

The rest is picked as for pretraining: `defaults`.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch

from patchsight_serve.dataset import read_dataset
from patchsight_serve.manifest import load_manifest
from patchsight_train.architecture import EncoderConfig, ViTConfig
from patchsight_train.build import recommended_pooling
from patchsight_train.choice import Choice, power_of_two, round_down, with_values
from patchsight_train.defaults import choose, from_run
from patchsight_train.encoder import default_pooling
from patchsight_train.finetune_settings import FineTuneSettings
from patchsight_train.initial import architecture_of
from patchsight_train.layers import check_blocks
from patchsight_train.machine import Machine, this_machine
from patchsight_train.run import read_config
from patchsight_train.survey import survey

EPOCHS = {False: 30, True: 100}  # without and with a GPU; 100 in MAE's Table 9
FEWEST_STEPS, MOST_EPOCHS = 1000, 300  # of few labels more epochs are made, up to so many
BATCH = {False: 128, True: 256}
PROBE_LR = 0.02  # at a batch of 256, of standardized features


def fill(
    settings: FineTuneSettings, labelled: int, run: Path, device: torch.device
) -> tuple[FineTuneSettings, list[str]]:
    """What is not given: as in the run that is there already, else picked. And what to say about it, a line each.

    labelled: how many images are trained on.

    Raises:
        InvalidRequest: what was given leaves nothing that fits.
    """
    if (run / "config.toml").is_file():
        settings = from_run(settings, read_config(run))
        check_blocks(settings.architecture, settings.blocks)
        return settings, [f"{run} is there: what is not given is as it was"]
    start = architecture_of(settings.init) if settings.init else None
    if start is not None:
        check_blocks(start, settings.blocks)
    machine = this_machine(device, settings)
    choice = Choice(settings)
    if start is not None:
        choice.pick(f"as in {settings.init}", image_size=start.image_size, pooling=pooling_of(settings, start))
    _pick(choice, labelled, machine)
    found = replace(survey([read_dataset(source) for source in settings.data], settings.limit), count=labelled)
    chosen, lines = choose(choice.settings, found, _partly(machine, settings), start)
    assert isinstance(chosen, FineTuneSettings)
    check_blocks(chosen.architecture, chosen.blocks)
    if chosen.pooling is None:  # of no --init
        chosen = with_values(chosen, {"pooling": default_pooling(chosen.architecture)})
    return chosen, choice.lines + lines


def pooling_of(settings: FineTuneSettings, start: EncoderConfig) -> str:
    """Which embedding of the encoder that --init gives counts."""
    assert settings.init is not None
    if not (settings.init / "config.toml").is_file():
        recommended = load_manifest(settings.init).recommended
        return default_pooling(start) if recommended == "both" else recommended
    return recommended_pooling(read_config(settings.init), start)


def _pick(choice: Choice, n: int, machine: Machine) -> None:
    s = choice.settings
    assert isinstance(s, FineTuneSettings)
    if s.blocks == 0:
        why = "the classifier alone is trained, on features that stay as they are"
        choice.pick(why, batch_norm=True, layer_decay=1.0, label_smoothing=0.0, weight_decay=0.0)
    elif s.scratch:
        choice.pick("random weights have nothing to keep", layer_decay=1.0)
    choice.pick("as usual where the encoder is trained", batch_norm=False)
    batch = min(BATCH[machine.gpu], max(power_of_two(n / 8), 8))
    choice.pick(f"from {n:,} labelled images", batch_size=max(batch // machine.ranks, 1) * machine.ranks)
    B = min(choice.settings.batch_size, n)
    least = math.ceil(FEWEST_STEPS / (n // B))
    epochs = min(max(EPOCHS[machine.gpu], least), MOST_EPOCHS)
    choice.pick(f"{n // B:,} steps each, {FEWEST_STEPS:,} at least where that is not too many epochs", epochs=epochs)
    if s.blocks == 0:
        choice.pick("of a classifier on standardized features", lr=float(f"{PROBE_LR * math.sqrt(B / 256):.1e}"))
    choice.pick("some twenty times in all", val_every=max(round_down(choice.settings.epochs / 20), 1))
    settings = choice.settings
    assert isinstance(settings, FineTuneSettings)
    choice.settings = with_values(settings, {"knn_every": settings.val_every})  # by this name the loop knows it


def _partly(machine: Machine, settings: FineTuneSettings) -> Machine:
    """The machine as it is for an encoder of which only the last blocks are trained: forward through all of it, a third
    of a whole pass, and backward through those."""

    def views_per_s(config: EncoderConfig) -> float:
        depth = config.depth if isinstance(config, ViTConfig) else 1
        share = 1.0 if settings.blocks == "all" else min(settings.blocks / depth, 1.0)
        return machine.views_per_s(config) / ((1 + 2 * share) / 3)

    return replace(machine, views_per_s=views_per_s)
