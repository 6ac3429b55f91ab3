"""Two engines on the same encoder: how much faster is the one, and does it compute the same?"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from patchsight_serve.encoder import Encoder, Pixels, Values
from patchsight_serve.trial_pictures import noise, photos, unseen_sizes

BATCHES = (1, 8)  # images in a run: a visitor's, and a busy server's
ROUNDS = 2  # at least, of each batch
ROUND_S = 0.03  # seconds that one engine's part of a round takes, at least


@dataclass(frozen=True)
class Trial:
    """What a candidate is beside the reference."""

    speed: float  # times as many images per second; the geometric mean over the batches
    difference: float  # max|a − b| / max|b|, the worst of all outputs and pictures; NaN where a number is none
    cosine: float  # the least of all embeddings


def compare(
    reference: Encoder, candidate: Encoder, seconds: float = 1.0, clock: Callable[[], float] = time.perf_counter
) -> Trial:
    """On noise and photos, and at other sizes where the graph takes any. The speeds take `seconds`, or two rounds."""
    pairs = list(_outputs(reference, candidate))
    embeddings = [(a, b) for name, a, b in pairs if name.endswith("_embedding")]
    return Trial(
        speed=_speed(reference, candidate, seconds, clock),
        difference=float(np.max([_difference(a, b) for _, a, b in pairs])),  # unlike max(), it passes NaN on
        cosine=float(np.min([_cosines(a, b).min() for a, b in embeddings])),
    )


def _outputs(reference: Encoder, candidate: Encoder) -> Iterator[tuple[str, Values, Values]]:
    """Each output of each set of pictures: its name, the reference's values and the candidate's."""
    manifest = reference.manifest
    pictures: list[Pixels] = [noise(manifest.transform.crop), photos(manifest.transform)]
    if manifest.dynamic_size:
        pictures += [noise(height, 2, width) for height, width in unseen_sizes(manifest)]
    for images in pictures:
        expected, found = (encoder.run(images, list(manifest.outputs)) for encoder in (reference, candidate))
        yield from ((name, expected[name], found[name]) for name in manifest.outputs)


def _difference(a: Values, b: Values) -> float:
    return float(np.abs(a - b).max() / max(np.abs(a).max(), np.finfo(np.float32).tiny))


def _cosines(a: Values, b: Values) -> Values:
    """`(N,)` of two `(N, D)`."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: Values = (a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float32).tiny)
    return cosines


def _speed(reference: Encoder, candidate: Encoder, seconds: float, clock: Callable[[], float]) -> float:
    """Interleaved, and the best round of each: what else the machine does must not decide."""
    output = f"{reference.manifest.recommended}_embedding"
    ratios = []
    for batch in BATCHES:
        images = noise(reference.manifest.transform.crop, batch)
        best = [float("inf"), float("inf")]
        repeats = _repeats(reference, images, output, clock)
        begun, rounds = clock(), 0
        while rounds < ROUNDS or clock() - begun < seconds / len(BATCHES):
            for i, encoder in enumerate((reference, candidate)):
                start = clock()
                for _ in range(repeats):
                    encoder.run(images, [output])
                best[i] = min(best[i], clock() - start)
            rounds += 1
        ratios.append(best[0] / max(best[1], 1e-9))
    return float(np.exp(np.log(ratios).mean()))


def _repeats(encoder: Encoder, images: Pixels, output: str, clock: Callable[[], float]) -> int:
    start = clock()
    encoder.run(images, [output])
    return max(1, round(ROUND_S / max(clock() - start, 1e-5)))
