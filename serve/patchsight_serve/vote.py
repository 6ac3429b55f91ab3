"""The weighted vote of DINO's k-NN classifier: neighbors vote for their class with weight exp(similarity / 0.07)."""

from typing import Any

import numpy as np

from patchsight_serve.nearest import F32, I64

TEMPERATURE = 0.07


def votes(
    similarity: F32, neighbor_labels: I64, num_classes: int, k: int, temperature: float = TEMPERATURE
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Summed weights per class, float64 `(Q, num_classes)`, of the first `k` neighbors of each query.

    similarity: float32 `(Q, K)`, best first. neighbor_labels: int64 `(Q, K)`, values 0 to num_classes - 1.
    """
    weights = np.exp(similarity[:, :k].astype(np.float64) / temperature)
    total = np.zeros((len(similarity), num_classes))
    # `add.at` adds one after the other, best first: the sums do not depend on how the queries were cut into chunks.
    np.add.at(total, (np.arange(len(similarity))[:, None], neighbor_labels[:, :k]), weights)
    return total


def vote(similarity: F32, neighbor_labels: I64, num_classes: int, k: int, temperature: float = TEMPERATURE) -> I64:
    """The class of each query, int64 `(Q,)`; of classes with equal votes the lower one. Arguments as in `votes`."""
    winners: I64 = votes(similarity, neighbor_labels, num_classes, k, temperature).argmax(axis=1).astype(np.int64)
    return winners
