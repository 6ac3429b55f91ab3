"""AdamW, and what it is told at each step."""

import torch

from patchsight_train.objective import Objective
from patchsight_train.schedule import cosine, warmup_cosine
from patchsight_train.settings import TrainSettings

SINGLE = ("cls_token", "reg_token", "mask_token", "pos_embed")


def adamw(objective: Objective, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW, arXiv:1711.05101, fused; biases, norms and single tokens are not decayed. One group for each scale of the
    learning rate that the objective has, and in it one for what is decayed and one for the rest."""
    members: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim == 1 or name.endswith(SINGLE)
            members.setdefault((objective.rate_scale(name), plain), []).append(parameter)
    groups = [
        {"params": parameters, "decays": not plain, "scale": scale}
        for (scale, plain), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)


def set_rates(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, step: int, total: int, steps_per_epoch: int
) -> dict[str, float]:
    """This step's learning rate, before it is scaled, and weight decay: set, and given back."""
    s = settings
    lr = warmup_cosine(step, total, round(s.warmup_epochs * steps_per_epoch), s.lr, s.final_lr)
    final = s.weight_decay if s.final_weight_decay is None else s.final_weight_decay
    decay = cosine(step, total, s.weight_decay, final)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
        group["weight_decay"] = decay if group["decays"] else 0.0
    return {"lr": lr, "weight_decay": decay}
