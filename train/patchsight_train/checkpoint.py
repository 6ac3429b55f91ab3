"""Checkpoints that survive `kill -9`: safetensors and JSON, never a pickle.

A checkpoint is `checkpoints/<step>/{model.safetensors, optimizer.safetensors, state.json}`. It is written in a folder
beside, every file is fsynced, and the folder renamed: what has its final name is complete. The newest two are kept.
Random numbers need no saving: every generator in training is seeded by (seed, step).
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchsight_serve.durable import sync
from patchsight_serve.errors import InvalidRequest

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """model: every parameter and buffer by name. optimizer: `<parameter>|<state>` by name. step: updates done."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    step: int


def save(run: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write `checkpoints/<step>` so that it is there whole or not at all; then drop all but the newest two."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    partial, final = folder / ".partial", folder / str(step)
    if final.exists():  # complete, and equal: a step's outcome is determined
        return
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(partial, step, module, optimizer)
        partial.rename(final)
    except BaseException:  # on a full disk what is incomplete would only take room
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(folder)
    for old in complete(run)[:-KEPT]:
        shutil.rmtree(folder / str(old))


def _write(folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    folder.mkdir()
    save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, folder / "model.safetensors")
    save_file(_optimizer_tensors(module, optimizer), folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": step}))
    for path in [*folder.iterdir(), folder]:
        sync(path)


def complete(run: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    folder = run / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def load(run: Path, step: int | None = None) -> Checkpoint:
    """The newest complete checkpoint, or that of `step`.

    Raises:
        InvalidRequest: there is none.
    """
    steps = complete(run)
    if not steps or (step is not None and step not in steps):
        raise InvalidRequest(f"{run}: no checkpoint{'' if step is None else f' of step {step}'}; there are {steps}")
    folder = run / "checkpoints" / str(steps[-1] if step is None else step)
    state = json.loads((folder / "state.json").read_text())
    return Checkpoint(
        load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors"), state["step"]
    )


def restore(checkpoint: Checkpoint, module: nn.Module, optimizer: torch.optim.Optimizer, run: Path) -> None:
    """Put a checkpoint back into a module and its optimizer.

    Raises:
        InvalidRequest: the checkpoint is of another architecture; the first differences are named.
    """
    found = checkpoint.model
    wrong = differences(module.state_dict(), found)
    if wrong:
        shown = "; ".join(wrong[:3])
        raise InvalidRequest(
            f"{run}: its checkpoint is of another architecture ({len(wrong)} differences: {shown}); "
            f"choose another --run, or the settings in {run / 'config.toml'}"
        )
    module.load_state_dict(found)
    _restore_optimizer(module, optimizer, checkpoint.optimizer)


def differences(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Every tensor that is missing, unknown or of another shape, a phrase each, in the order of the alphabet."""
    wrong = [f"{k} is missing" for k in wanted.keys() - found.keys()]
    wrong += [f"{k} is unknown" for k in found.keys() - wanted.keys()]
    wrong += [
        f"{k} is {tuple(found[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in wanted.keys() & found.keys()
        if found[k].shape != wanted[k].shape
    ]
    return sorted(wrong)


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state  # a frozen one has no state yet
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    states: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        parameter, key = name.split("|")
        device = "cpu" if key == "step" and not parameters[parameter].is_cuda else parameters[parameter].device
        value = value.to(device)
        if value.shape == parameters[parameter].shape:  # in its memory layout: fused optimizers ignore strides
            value = torch.empty_like(parameters[parameter], dtype=value.dtype).copy_(value)
        states.setdefault(parameter, {})[key] = value
    for name, state in states.items():
        optimizer.state[parameters[name]] = state
