"""Fine-tuning of a trained encoder on few labels, as the lessons on MAE need it (arXiv:2111.06377)."""

import copy

import torch
import torch.nn.functional as F
from lesson import Split
from torch import Generator, nn

from patchsight_train.encoder import Encoder
from patchsight_train.randomness import Randomness
from patchsight_train.views import View, augment, eval_view


def fine_tuned(encoder: Encoder, split: Split, seed: int, labelled: int, epochs: int) -> float:
    """Test accuracy after training all of a copy of the encoder, and a linear classifier on its mean patch token.

    Args:
        labelled: how many of the training images, a multiple of the batch of 128.
        epochs: passes over them.
    """
    assert split.train.labels is not None
    assert split.test.labels is not None
    torch.manual_seed(seed)
    encoder, head = copy.deepcopy(encoder).train(), nn.Linear(encoder.config.width, 10)
    total, B = epochs * labelled // 128, 128
    parameters = [p for p in [*encoder.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total)
    view, random = View(32, scale=(0.5, 1.0)), Randomness(Generator().manual_seed(seed))
    for step in range(total):
        if step % (labelled // B) == 0:
            order = torch.randperm(labelled, generator=random.generator)
        rows = order[step * B % labelled :][:B]
        x = augment(split.train.pixels[rows], view, random)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = head(encoder.pooled(x, "mean"))
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(logits.float(), split.train.labels[rows]))
        optimizer.step()
        schedule.step()
    encoder.eval()
    with torch.no_grad():
        pooled = torch.cat([encoder.pooled(eval_view(part), "mean") for part in torch.split(split.test.pixels, 512)])
        predicted = head(pooled).argmax(dim=1)
    return float((predicted == split.test.labels).float().mean())
