"""Schedules: pure functions of the step. Nothing here knows an optimizer."""

import math


def warmup_cosine(step: int, total: int, warmup: int, peak: float, final: float = 0.0) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then half a cosine down to `final` at `total`.

    Step 0 already has `peak / warmup`, so that no step is wasted on a rate of zero.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, max(total - warmup, 1), peak, final)


def cosine(step: float, total: float, start: float, final: float) -> float:
    """Half a cosine from `start` at step 0 to `final` at step `total`, constant after it."""
    progress = min(step / total, 1.0)
    return final + (start - final) * (1 + math.cos(math.pi * progress)) / 2
