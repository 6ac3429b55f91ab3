"""What does an encoder lose in fp16, bf16 and int8, and what does it gain?

    python benchmarks/precision.py             # half an hour on one core
    python benchmarks/precision.py ENCODER     # one of the two; the other's figures stay

The ViT-Tiny that ship, by their published graphs, converted as `patchsight-export BUNDLE --precision` does: file size,
speed on one thread of this CPU, the recommended embedding's cosine to fp32, the ten nearest of each query in the
gallery that stay the same, and DINO's 20-NN, gallery and queries both at that precision. Of one encoder also what was
not chosen for int8. bf16, which ONNX Runtime cannot run on a CPU, by onnx's reference evaluator on a few images.
Writes `benchmarks/results/precision.json` and the tables in docs.
"""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from measure import DATA, ROOT, publish, save
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import CalibrationMethod

from patchsight_export.agreement import NEIGHBORS, cosine, speed
from patchsight_export.bundle_source import read_bundle
from patchsight_export.half_compute import to_half
from patchsight_export.half_weights import store_half
from patchsight_export.precision import CALIBRATING
from patchsight_export.quantization import CHOSEN, linear_maps, to_int8
from patchsight_serve.dataset import read_dataset
from patchsight_serve.decode import decode
from patchsight_serve.manifest import Transform
from patchsight_serve.nearest import normalize
from patchsight_serve.protocol import Rows, evaluate

# Encoder, data, images in the gallery.
TRIALS = (
    ("simclr-vit-tiny-cifar10-long", "cifar10", "cifar10/train.parquet", "cifar10/test.parquet", 3000),
    ("simclr-vit-tiny-photos", "tiny_imagenet", "tiny_imagenet/train-*.parquet", "tiny_imagenet/test.parquet", 2000),
)
QUERIES = 1000
BATCH = 32
REFERENCE = 32  # images for bf16: the reference evaluator is slow
Make = Callable[[onnx.ModelProto, np.ndarray], onnx.ModelProto]


class Images(NamedTuple):
    """uint8 `(N, S, S, 3)` and int64 `(N,)`."""

    pixels: np.ndarray
    labels: np.ndarray


def read(pattern: str, rows: range, size: int) -> Images:
    dataset, transform = read_dataset(DATA / pattern), Transform(resize=size, crop=size)
    assert dataset.labels is not None
    with ThreadPoolExecutor(2) as pool:
        return Images(
            np.stack(list(pool.map(lambda i: decode(dataset.read(i), transform), rows))), dataset.labels[list(rows)]
        )


def precisions() -> dict[str, Make]:
    return {"fp16": lambda model, _: to_half(model, "fp16"), "int8": to_int8}


def variants() -> dict[str, Make]:
    """What int8 could be otherwise, one thing at a time."""

    def options(**changed: Any) -> Make:
        return lambda model, images: to_int8(model, images, **changed)

    def with_convolutions(model: onnx.ModelProto, images: np.ndarray) -> onnx.ModelProto:
        convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
        return to_int8(
            model,
            images,
            op_types_to_quantize=["MatMul", "Conv"],
            nodes_to_quantize=linear_maps(model) + convolutions,
            extra_options=CHOSEN["extra_options"] | {"OpTypesToExcludeOutputQuantization": ["MatMul", "Conv"]},
        )

    def without_the_last_of_four(model: onnx.ModelProto, images: np.ndarray) -> onnx.ModelProto:
        return to_int8(
            model, images, nodes_to_quantize=[name for i, name in enumerate(linear_maps(model)) if i % 4 != 3]
        )

    return {
        "weights of 8 bits": options(reduce_range=False),
        "one scale a weight": options(per_channel=False),
        "results rounded too": options(extra_options={"MatMulConstBOnly": True}),
        "ranges by the 99.999th percentile": lambda model, images: to_int8(
            model,
            images[:128],
            calibrate_method=CalibrationMethod.Percentile,
            extra_options=CHOSEN["extra_options"] | {"CalibPercentile": 99.999},
        ),
        "convolutions too": with_convolutions,
        "fc2, behind the GELU, in fp32": without_the_last_of_four,
    }


class Trial:
    """An encoder, its images, and what it makes of them in fp32."""

    def __init__(self, name: str, train: str, test: str, gallery: int) -> None:
        self.manifest, self.model = read_bundle(ROOT / "model_repository" / name)
        size, self.output = self.manifest.transform.crop, f"{self.manifest.recommended}_embedding"
        self.calibrating = read(train, range(gallery, gallery + CALIBRATING), size).pixels
        self.gallery, self.queries = read(train, range(gallery), size), read(test, range(QUERIES), size)
        self.full = self.session(self.model)
        self.before = self.embedded(self.full)

    def session(self, model: onnx.ModelProto) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, session: ort.InferenceSession, pixels: np.ndarray) -> np.ndarray:
        found: np.ndarray = session.run([self.output], {"image": pixels})[0]
        return found

    def embedded(self, session: ort.InferenceSession) -> tuple[np.ndarray, np.ndarray]:
        """Unit rows of gallery and queries."""
        sides = []
        for images in (self.gallery.pixels, self.queries.pixels):
            sides.append(
                np.concatenate([self.run(session, images[i : i + BATCH]) for i in range(0, len(images), BATCH)])
            )
        return normalize(sides[0]), normalize(sides[1])

    def knn(self, gallery: np.ndarray, queries: np.ndarray) -> float:
        return evaluate(gallery, self.gallery.labels, queries, self.queries.labels).accuracy[20]

    def row(self, make: Make) -> dict[str, float]:
        low = make(self.model, self.calibrating)
        store_half(low)
        session = self.session(low)
        after = self.embedded(session)
        cosines = np.concatenate([cosine(a, b) for a, b in zip(self.before, after, strict=True)])
        nearest = [Rows(gallery).search(queries, NEIGHBORS)[1] for gallery, queries in (self.before, after)]
        same = [len(set(a) & set(b)) / NEIGHBORS for a, b in zip(*nearest, strict=True)]
        few = self.queries.pixels[:4]
        return {
            "megabytes": low.ByteSize() / 1e6,
            "size": low.ByteSize() / self.model.ByteSize(),
            "speed": speed(lambda: self.run(self.full, few), lambda: self.run(session, few)),
            "cosine_least": float(cosines.min()),
            "cosine_mean": float(cosines.mean()),
            "top10_overlap": float(np.mean(same)),
            "knn_change": self.knn(*after) - self.knn(*self.before),
        }

    def bf16(self) -> dict[str, float]:
        low = to_half(self.model, "bf16")
        images = self.queries.pixels[:REFERENCE]
        outputs: Any = ReferenceEvaluator(low).run([self.output], {"image": images})
        cosines = cosine(self.run(self.full, images), outputs[0])
        return {
            "megabytes": low.ByteSize() / 1e6,
            "size": low.ByteSize() / self.model.ByteSize(),
            "cosine_least": float(cosines.min()),
            "cosine_mean": float(cosines.mean()),
        }


def rows(trial: Trial, all_of_them: bool) -> Iterator[tuple[str, dict[str, float]]]:
    for name, make in precisions().items():
        yield name, trial.row(make)
    yield "bf16", trial.bf16()
    for name, make in variants().items() if all_of_them else ():
        yield f"int8, {name}", trial.row(make)


def main() -> None:
    for i, trial in enumerate(TRIALS):
        if trial[0] in (sys.argv[1:] or [trial[0] for trial in TRIALS]):
            measure(*trial, all_of_them=i == 0)
    found = kept()
    publish("precision", table(found, lambda name: "," not in name))
    first = TRIALS[0][0]
    publish("int8", table({first: found[first]}, lambda name: name.startswith("int8")))


def measure(name: str, data: str, train: str, test: str, gallery: int, all_of_them: bool) -> None:
    trial = Trial(name, train, test, gallery)
    found: dict[str, Any] = {"data": data, "gallery": gallery, "queries": QUERIES, "calibrating": CALIBRATING}
    found["fp32_knn"] = trial.knn(*trial.before)
    for precision, row in rows(trial, all_of_them):
        found[precision] = row
        print(name, precision, row, flush=True)
        save("precision", {"threads": 1, "reference_images": REFERENCE, "encoders": kept() | {name: found}})


def kept() -> dict[str, Any]:
    """What was found so far, by encoder."""
    path = ROOT / "benchmarks" / "results" / "precision.json"
    found: dict[str, Any] = json.loads(path.read_text())["encoders"] if path.is_file() else {}
    return found


def table(results: dict[str, dict[str, Any]], shown: Callable[[str], bool]) -> str:
    lines = [
        "| | file, of fp32's | speed, to fp32's | cosine: mean, least | ten nearest the same | 20-NN, points |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for encoder, found in results.items():
        for name, row in found.items():
            if not isinstance(row, dict) or not shown(name):
                continue
            cells = [
                f"{row['megabytes']:.1f} MB, {row['size']:.2f}",
                f"{row['speed']:.2f}×" if "speed" in row else "–",
                f"{row['cosine_mean']:.5f}, {row['cosine_least']:.5f}",
                f"{100 * row['top10_overlap']:.1f} %" if "top10_overlap" in row else "–",
                f"{100 * row['knn_change']:+.1f}, from {100 * found['fp32_knn']:.1f}" if "knn_change" in row else "–",
            ]
            lines.append(f"| {encoder}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
