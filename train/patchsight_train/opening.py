"""How a command that trains begins: on which device, which of its ranks speaks, and what is said first."""

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from patchsight_train import distributed
from patchsight_train.device import pick_device
from patchsight_train.settings import TrainSettings

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}


def begin(settings: TrainSettings) -> tuple[torch.device, bool, Console]:
    """Joins the other ranks, if there are any. This rank's device; whether it leads; and where it writes: nowhere, if
    it does not. Raises InvalidRequest if the device is not there."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    distributed.start(device)
    leader = distributed.rank() == 0
    console = Console() if leader else Console(file=open(os.devnull, "w"))  # noqa: SIM115, PTH123 - until the process ends
    return device, leader, console


def announce(console: Console, prog: str, run: Path, settings: TrainSettings, picked: list[str]) -> None:
    """What runs, with which settings, and why those that nobody gave."""
    console.print(f"{prog} → {run}\n{settings.describe()}", **PLAIN)
    if picked:
        console.print("\n".join(["picked:", *(f"  {line}" for line in picked)]), **PLAIN)
