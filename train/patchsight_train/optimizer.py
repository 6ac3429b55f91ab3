"""AdamW, and what it is told at each step."""

import torch
from torch import nn

from patchsight_train.schedule import cosine, warmup_cosine
from patchsight_train.settings import TrainSettings

SINGLE = ("cls_token", "reg_token", "mask_token", "pos_embed")


def adamw(objective: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW, arXiv:1711.05101, fused; biases, norms and single tokens are not decayed."""
    trained = [(n, p) for n, p in objective.named_parameters() if p.requires_grad]
    plain = {n for n, p in trained if p.ndim == 1 or n.endswith(SINGLE)}
    groups = [
        {"params": [p for n, p in trained if n not in plain], "decays": True},
        {"params": [p for n, p in trained if n in plain], "decays": False},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, settings.beta2), fused=True)


def set_rates(
    optimizer: torch.optim.Optimizer, settings: TrainSettings, step: int, total: int, steps_per_epoch: int
) -> dict[str, float]:
    """This step's learning rate and weight decay, set and given back."""
    s = settings
    lr = warmup_cosine(step, total, round(s.warmup_epochs * steps_per_epoch), s.lr, s.final_lr)
    final = s.weight_decay if s.final_weight_decay is None else s.final_weight_decay
    decay = cosine(step, total, s.weight_decay, final)
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = decay if group["decays"] else 0.0
    return {"lr": lr, "weight_decay": decay}
