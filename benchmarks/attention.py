"""Which attention trains fastest on this CPU: torch's fused operator, or an explicit softmax?

    python benchmarks/attention.py     # about 2 minutes

One training step (forward, backward, AdamW) of the shipped architecture at batch 256, in the precision that training
picks on this machine; the two alternate, and a ratio of CPU time is taken within each round. Writes
`benchmarks/results/attention.json`. `vit.Attention.forward` follows what this finds.
"""

import statistics
import time
from collections.abc import Callable

import torch
from measure import save
from torch import Tensor

from patchsight_train.architecture import ViTConfig
from patchsight_train.device import pick_precision
from patchsight_train.vit import Attention, ViT

BATCH, ROUNDS = 256, 7
SHIPPED = ViTConfig(image_size=32, patch_size=4, width=128, depth=4, heads=4, stem="conv")


def fused(self: Attention, x: Tensor) -> Tensor:
    """What `forward` does on a GPU and in export."""
    y = torch.nn.functional.scaled_dot_product_attention(*self.heads_of(x))
    out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
    return out


def explicit(self: Attention, x: Tensor) -> Tensor:
    """Three plain operators."""
    return self.explicit(x)[0]


def seconds(step: Callable[[], None]) -> float:
    """CPU time of one step, in all threads."""
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    torch.manual_seed(0)
    dtype = pick_precision("auto", torch.device("cpu"))
    encoder = ViT(SHIPPED)
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    images = torch.randn(BATCH, 3, SHIPPED.image_size, SHIPPED.image_size)

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            tokens = encoder(images)
        tokens.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    forward = Attention.forward
    times: dict[str, list[float]] = {"fused": [], "explicit": []}
    try:
        for round_ in range(ROUNDS + 1):
            for name, attention in (("fused", fused), ("explicit", explicit)):
                Attention.forward = attention  # type: ignore[method-assign]
                spent = seconds(step)
                if round_:  # the first warms up
                    times[name].append(spent)
    finally:
        Attention.forward = forward  # type: ignore[method-assign]
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = sorted(f / e for f, e in zip(times["fused"], times["explicit"], strict=True))
    save(
        "attention",
        {
            "precision": str(dtype).removeprefix("torch."),
            "tokens": SHIPPED.grid**2 + 1,
            "batch": BATCH,
            "cpu_seconds_per_step": median,
            "fused_over_explicit": {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]},
        },
    )
    print(f"CPU seconds per step: {median}; fused / explicit {ratios[0]:.2f} to {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
