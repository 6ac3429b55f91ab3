"""How near an encoder at another precision stays to itself in fp32, what it saves, and when that is too little."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from patchsight_serve.encoder import Pixels, Values
from patchsight_serve.errors import BundleError
from patchsight_serve.nearest import I64, normalize
from patchsight_serve.protocol import HEADLINE, Rows, evaluate

# Least cosine of an embedding, or of a picture's attention or patch tokens, to the same in fp32; of int8 the mean's.
LIMITS = {"fp16": 0.999, "bf16": 0.999, "int8": 0.98}
NEIGHBORS = 10
BATCH = 32
ROUNDS = 7
ROUND_S = 0.2  # that one graph takes in one round, at least


class Judges(NamedTuple):
    """uint8 `(N, S, S, 3)`, and int64 `(N,)`, −1 where an image has no label; None where none has one."""

    images: Pixels
    labels: I64 | None


def agreement(
    full: ort.InferenceSession, low: ort.InferenceSession, outputs: Mapping[str, Any], recommended: str, judges: Judges
) -> dict[str, Any]:
    """What `low` gives against `full`, the same encoder in fp32, as figures for `measured`.

    Raises:
        BundleError: a value of `low` is not finite.
    """
    names = list(outputs)
    cosines: dict[str, list[Values]] = {name: [] for name in names}
    embedded: tuple[list[Values], list[Values]] = [], []
    for i in range(0, len(judges.images), BATCH):
        feed = {"image": judges.images[i : i + BATCH]}
        for name, a, b in zip(names, full.run(names, feed), low.run(names, feed), strict=True):
            if not np.isfinite(b).all():
                raise BundleError(
                    f"not published: {name} is not finite on images {i} to {i + len(b) - 1}: a number inside is beyond "
                    "the range of this precision (fp16: 65,504)"
                )
            cosines[name].append(cosine(a, b))
            if name == recommended:
                embedded[0].append(a)
                embedded[1].append(b)
    units = [normalize(np.concatenate(side)) for side in embedded]
    joined = {name: np.concatenate(parts) for name, parts in cosines.items()}
    found: dict[str, Any] = {
        "images": len(judges.images),
        "cosine": {
            n: {"least": round(float(c.min()), 6), "mean": round(float(c.mean()), 6)} for n, c in joined.items()
        },
        "speed": speed(*[lambda s=s: s.run([recommended], {"image": judges.images[:4]}) for s in (full, low)]),
    }
    if len(units[0]) > NEIGHBORS:
        found["top10_overlap"] = overlap(*units)
    return found | knn(units[0], units[1], judges.labels)


def cosine(a: Values, b: Values) -> Values:
    """Of each row, all its numbers in line: float32 `(N,)`."""
    x, y = (values.reshape(len(values), -1).astype(np.float64) for values in (a, b))
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    result: Values = ((x * y).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)).astype(np.float32)
    return result


def overlap(full: Values, low: Values) -> float:
    """Share of each image's nearest ten among the others that stays among its nearest ten; mean over unit rows."""
    own = np.arange(len(full))
    (_, before), (_, after) = (Rows(side).search(side, NEIGHBORS, own) for side in (full, low))
    return round(float(np.mean([len(set(a) & set(b)) / NEIGHBORS for a, b in zip(before, after, strict=True)])), 4)


def knn(full: Values, low: Values, labels: I64 | None) -> dict[str, Any]:
    """20-NN by DINO's protocol, each labelled image against all others: accuracy of both. Nothing without labels."""
    known = np.empty(0, np.int64) if labels is None else np.flatnonzero(labels >= 0)
    if labels is None or len(known) <= HEADLINE or len(set(labels[known])) < 2:
        return {}
    own, y = np.arange(len(known)), labels[known]
    before, after = (evaluate(s[known], y, s[known], y, own=own).accuracy[HEADLINE] for s in (full, low))
    return {"knn": {"k": HEADLINE, "images": len(known), "fp32": before, "accuracy": after}}


def speed(full: Callable[[], object], low: Callable[[], object]) -> float:
    """How many times as fast `low` is, on this machine: median over rounds in which both take turns. In CPU time, which
    others on the machine do not change; no measure of a GPU."""
    repeats = [_repeats(run) for run in (full, low)]
    ratios = []
    for _ in range(ROUNDS):
        took = []
        for run, times in zip((full, low), repeats, strict=True):
            start = time.process_time()
            for _ in range(times):
                run()
            took.append((time.process_time() - start) / times)
        ratios.append(took[0] / took[1])
    return round(float(np.median(ratios)), 3)


def _repeats(run: Callable[[], object]) -> int:
    run()
    start = time.process_time()
    run()
    return max(1, round(ROUND_S / max(time.process_time() - start, 1e-5)))


def check(precision: str, figures: dict[str, Any]) -> None:
    """Raises BundleError where an output is further from fp32 than `LIMITS` allows."""
    which, limit = "mean" if precision == "int8" else "least", LIMITS[precision]
    for name, values in figures["cosine"].items():
        if not values[which] >= limit:
            raise BundleError(
                f"not published: at {precision} the {which} cosine of {name} to fp32 is {values[which]:.4f} over "
                f"{figures['images']:,} images, the limit {limit}"
            )


def table(precision: str, figures: dict[str, Any]) -> str:
    """The figures for people, a line each."""
    which, limit = "mean" if precision == "int8" else "least", LIMITS[precision]
    megabytes = figures["bytes"] / 1e6, figures["fp32_bytes"] / 1e6
    rows = [("file, MB", f"{megabytes[0]:.2f}, fp32 {megabytes[1]:.2f}: {megabytes[0] / megabytes[1]:.2f}×")]
    if "speed" in figures:
        rows.append(("speed on this machine", f"{figures['speed']:.2f}× fp32"))
    for name, values in figures["cosine"].items():
        rows.append((f"cosine of {name}", f"least {values['least']:.6f}, mean {values['mean']:.6f}"))
    if "top10_overlap" in figures:
        rows.append(("same among the ten nearest", f"{100 * figures['top10_overlap']:.1f} %"))
    if "knn" in figures:
        k = figures["knn"]
        change = 100 * (k["accuracy"] - k["fp32"])
        rows.append((f"{k['k']}-NN, each against the others", f"{change:+.2f} points, from {100 * k['fp32']:.2f} %"))
    head = f"{precision} against fp32, on {figures['images']:,} images; limit: {which} cosine {limit}"
    return "\n".join([head, *(f"  {what:<32}{said}" for what, said in rows)])
