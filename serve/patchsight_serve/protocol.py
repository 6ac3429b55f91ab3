"""DINO's k-NN protocol: how well nearest neighbors classify.

Eval transform on gallery and query; L2-normalized embeddings; the k best by cosine, equal ones by their row in the
gallery; votes weighted exp(similarity / 0.07), equal sums to the lower class.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.nearest import F32, I64, Flat, nearest
from patchsight_serve.vote import vote

KS = (1, 5, 10, 20, 100, 200)
HEADLINE = 20
CHUNK = 1024  # queries at a time, for the progress bar; predictions do not depend on it


@dataclass(frozen=True)
class Figures:
    """What one evaluation gives. predictions: int64 `(Q,)` by k. accuracy: fraction by k. headline: the k to quote."""

    predictions: dict[int, I64]
    accuracy: dict[int, float]
    headline: int
    interval: tuple[float, float]  # 95 %, of the headline's accuracy


class Rows:
    """A gallery of unit vectors float32 `(N, D)`, to be searched by row. It is not copied."""

    def __init__(self, gallery: F32) -> None:
        self._index = Flat(gallery)

    def search(self, queries: F32, k: int, own: I64 | None = None) -> tuple[F32, I64]:
        """The `k` best rows for each unit query of `(Q, D)`: similarity float32 and row int64, both `(Q, k)`, best
        first, equal similarities by row. own: int64 `(Q,)`, a row that is left out of each, −1 for none. k is at most
        N, or N − 1 where rows are left out."""
        similarity = np.empty((len(queries), k), np.float32)
        rows = np.empty((len(queries), k), np.int64)
        for q, (found, scores) in enumerate(nearest(self._index, queries, k + (own is not None))):
            best = np.lexsort((found, -scores))
            if own is not None:
                best = best[found[best] != own[q]]
            similarity[q], rows[q] = scores[best[:k]], found[best[:k]]
        return similarity, rows


def evaluate(
    gallery: F32,
    gallery_labels: I64,
    queries: F32,
    query_labels: I64,
    advance: Callable[[int], None] = lambda _: None,
    own: I64 | None = None,
) -> Figures:
    """Classify each query by its neighbors in the gallery, for every k of the protocol that the gallery allows.

    Vectors are unit, float32; labels int64, 0 or more. advance: told how many queries are done, chunk by chunk.
    own: int64 `(Q,)`, the gallery's row that is the query itself and may not vote; −1 where there is none.
    """
    ks = [k for k in KS if k <= len(gallery) - (own is not None)]
    if not ks:
        raise InvalidRequest(f"a gallery of {len(gallery)} images leaves no neighbor to vote")
    indexed = Rows(gallery)
    num_classes = int(max(gallery_labels.max(), query_labels.max())) + 1
    predictions = {k: np.empty(len(queries), np.int64) for k in ks}
    for start in range(0, len(queries), CHUNK):
        part = slice(start, start + CHUNK)
        similarity, rows = indexed.search(queries[part], max(ks), None if own is None else own[part])
        for k in ks:
            predictions[k][part] = vote(similarity, gallery_labels[rows], num_classes, k)
        advance(len(similarity))
    return judged(predictions, query_labels)


def judged(predictions: dict[int, I64], query_labels: I64) -> Figures:
    """The figures of predictions int64 `(Q,)` by k."""
    right = {k: int((found == query_labels).sum()) for k, found in predictions.items()}
    headline = max(k for k in predictions if k <= HEADLINE)
    accuracy = {k: number / len(query_labels) for k, number in right.items()}
    return Figures(predictions, accuracy, headline, wilson(right[headline], len(query_labels)))


@dataclass(frozen=True)
class FewShot:
    """Accuracy of the headline k, a fraction for each draw, with `shots` images of each class as the gallery."""

    shots: int
    accuracy: list[float]
    short: list[int]  # classes that have fewer images than that, and give all they have


def few_shot(
    gallery: F32,
    gallery_labels: I64,
    queries: F32,
    query_labels: I64,
    shots: int,
    draws: int,
    seed: int = 0,
    own: I64 | None = None,
) -> FewShot:
    """The protocol with a gallery of `shots` images of each class, drawn anew `draws` times. Else as `evaluate`."""
    rng = np.random.default_rng((seed, shots))
    members = {int(label): np.flatnonzero(gallery_labels == label) for label in np.unique(gallery_labels)}
    accuracy = []
    for _ in range(draws):
        drawn = np.sort(np.concatenate([rng.permutation(rows)[:shots] for rows in members.values()]))
        place = np.full(len(gallery) + 1, -1)  # of a row among those drawn; the last is for −1
        place[drawn] = np.arange(len(drawn))
        figures = evaluate(
            gallery[drawn], gallery_labels[drawn], queries, query_labels, own=None if own is None else place[own]
        )
        accuracy.append(figures.accuracy[figures.headline])
    return FewShot(shots, accuracy, [label for label, rows in members.items() if len(rows) < shots])


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a fraction; 95 % with this z. It stays within 0 to 1, also for 3 of 3."""
    p = right / total
    center = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * float(np.sqrt(p * (1 - p) / total + z * z / (4 * total * total)))
    # At the ends the formula is exact, its rounding is not.
    return (0.0 if right == 0 else center - half), (1.0 if right == total else center + half)
