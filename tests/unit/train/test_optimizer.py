import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from patchsight_train.loop import Trainer
from patchsight_train.optimizer import adamw, set_rates

Make = Callable[..., Trainer]


def test_rates_follow_their_schedules(trainer: Make, random_pixels: Tensor, settings: Callable[..., Any]) -> None:
    changes = {
        "epochs": 10, "warmup_epochs": 1.5, "lr": 0.3, "final_lr": 0.1, "weight_decay": 0.2, "final_weight_decay": 0.6,
    }  # fmt: skip
    optimizer = trainer("mae", random_pixels, **changes).updater.optimizer
    seen = []
    for step in (0, 2, 3, 20):
        said = set_rates(optimizer, settings("mae", **changes), step, 20, 2)
        decays, plain = optimizer.param_groups
        assert said == {"lr": decays["lr"], "weight_decay": decays["weight_decay"]}
        assert decays["lr"] == plain["lr"]
        assert plain["weight_decay"] == 0
        seen.append((decays["lr"], decays["weight_decay"]))
    assert [lr for lr, _ in seen] == pytest.approx([0.1, 0.3, 0.3, 0.1])
    assert [decay for _, decay in seen] == pytest.approx(
        [0.6 - 0.4 * (1 + math.cos(math.pi * step / 20)) / 2 for step in (0, 2, 3, 20)]
    )


@pytest.mark.parametrize("objective", ["mae", "simclr", "dino"])
def test_matrices_decay_and_nothing_else_does(
    objective: str, trainer: Make, random_pixels: Tensor, settings: Callable[..., Any]
) -> None:
    module = trainer(objective, random_pixels, registers=2).objective
    decays, plain = adamw(module, settings(objective)).param_groups
    names = {p: n for n, p in module.named_parameters()}
    assert all(p.requires_grad for group in (decays, plain) for p in group["params"])
    together = [names[p] for group in (decays, plain) for p in group["params"]]
    assert sorted(together) == sorted(n for n, p in module.named_parameters() if p.requires_grad)
    assert all(names[p].endswith(("weight", "original1")) and p.ndim >= 2 for p in decays["params"])
    assert not any(p.ndim >= 2 and names[p].endswith("weight") for p in plain["params"])
    if objective != "mae":  # whose positions are fixed
        assert any(names[p].endswith("pos_embed") for p in plain["params"])
