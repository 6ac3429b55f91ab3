"""A training, three exports of it, and the neighbors of all: torch, fp32, fp16 and int8 see the same, in process and on
a real Triton."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from patchsight_export.__main__ import main as export
from patchsight_export.source import read_run
from patchsight_serve.bundle_check import check
from patchsight_serve.dataset import read_dataset
from patchsight_serve.decode import decode
from patchsight_serve.encoder import RemoteEncoder
from patchsight_serve.manifest import load_manifest
from patchsight_serve.nearest import normalize
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.protocol import evaluate
from patchsight_serve.triton_discovery import find_encoders
from patchsight_serve.triton_engine import TritonEngine
from patchsight_train.data import eval_transform
from patchsight_train.probe import embed

TRAIN, TEST, BATCH = 2000, 1000, 50
POINTS = {"fp32": 0.5, "fp16": 0.5, "int8": 1.0}  # of 20-NN, from torch's
SAME = {"fp32": 0.999, "fp16": 0.995, "int8": 0.9}  # share of the predictions


@pytest.fixture(scope="module")
def cifar(first_of_cifar: Callable[[int, int], Path]) -> Path:
    return first_of_cifar(TRAIN, TEST)


def side(cifar: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    dataset = read_dataset(cifar / f"{part}.parquet")
    assert dataset.labels is not None
    return np.stack([decode(dataset.read(i), eval_transform(32)) for i in range(len(dataset))]), dataset.labels


def check_round_trip(
    cifar: Path, folder: Path, command: Callable, start_triton: Callable, training: tuple[object, ...]
) -> None:
    run = folder / "runs" / "micro"
    trained = command(
        "patchsight-train", "simclr", "--data", cifar / "train.parquet", "--run", run, "--stem", "conv",
        "--batch-size", 100, "--warmup-epochs", 1, "--projection-hidden", 128, "--threads", 1, *training,
        timeout=900,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    (gallery, labels), (queries, truth) = side(cifar, "train"), side(cifar, "test")

    def knn(vectors: Callable[[np.ndarray], np.ndarray]) -> tuple[float, np.ndarray]:
        figures = evaluate(normalize(vectors(gallery)), labels, normalize(vectors(queries)), truth)
        return 100 * figures.accuracy[20], figures.predictions[20]

    encoder = read_run(run).encoder
    accuracy, predicted = knn(
        lambda x: embed(encoder, torch.from_numpy(x).permute(0, 3, 1, 2), "cls", torch.device("cpu")).numpy()
    )
    assert accuracy > 25  # ten classes: chance is 10
    sizes = {}
    for precision, points in POINTS.items():
        bundle = folder / "model_repository" / precision
        source = run if precision == "fp32" else bundle.parent / "fp32"
        calibrate = ["--calibrate", str(cifar / "train.parquet")] if precision == "int8" else []
        export([str(source), str(bundle), "--precision", precision, *calibrate])
        assert any(f"computed in {precision}" in line for line in check(bundle))
        served = OrtEncoder(bundle, threads=1)
        assert served.manifest.precision == precision
        found, predictions = knn(lambda x, served=served: run_in_batches(served, x))
        assert abs(found - accuracy) <= points, precision
        assert (predictions == predicted).mean() >= SAME[precision], precision
        check_alone(served, queries[:8])
        sizes[precision] = (bundle / "1" / "model.onnx").stat().st_size
    assert max(sizes["fp16"], sizes["int8"]) < 0.7 * sizes["fp32"]
    check_verdict(folder / "model_repository" / "int8")
    triton = start_triton(*(folder / "model_repository" / precision for precision in POINTS))
    for name, remote in find_encoders(triton.address, wait_s=5).items():
        served = OrtEncoder(folder / "model_repository" / name, threads=1)
        asyncio.run(check_on_triton(remote, served, queries[:BATCH]))


async def check_on_triton(remote: RemoteEncoder, served: OrtEncoder, images: np.ndarray) -> None:
    """The numbers that the neighbors above were found by."""
    outputs = list(remote.manifest.outputs)
    wanted = served.run(images, outputs)
    async with TritonEngine(remote) as engine:
        found, _ = await engine.run(list(images), outputs)
    for name in outputs:
        error = np.abs(np.stack([result[name] for result in found]) - wanted[name]).max()
        assert error <= 1e-6 * np.abs(wanted[name]).max(), (remote.manifest.name, name)


def run_in_batches(served: OrtEncoder, pixels: np.ndarray) -> np.ndarray:
    parts = [served.run(pixels[i : i + BATCH], ["cls_embedding"]) for i in range(0, len(pixels), BATCH)]
    return np.concatenate([part["cls_embedding"] for part in parts])


def check_alone(served: OrtEncoder, images: np.ndarray) -> None:
    names = ["cls_embedding", "mean_embedding"]
    together = served.run(images, names)
    for i in range(len(images)):
        alone = served.run(images[i : i + 1], names)
        for name in names:
            error = np.abs(alone[name][0] - together[name][i]).max() / np.abs(together[name]).max()
            assert error <= 1e-6, (name, i)


def check_verdict(bundle: Path) -> None:
    """What export said of int8 is what is measured here."""
    figures = load_manifest(bundle).measured["precision"]
    assert figures["images"] == 1000
    assert 0.98 <= figures["cosine"]["cls_embedding"]["mean"] < 1
    assert abs(figures["knn"]["accuracy"] - figures["knn"]["fp32"]) < 0.03


def test_round_trip(cifar: Path, tmp_path: Path, command: Callable, start_triton: Callable) -> None:
    check_round_trip(cifar, tmp_path, command, start_triton, ("--width", 64, "--depth", 2, "--heads", 2, "--epochs", 2))


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_round_trip_after_a_minute_of_training(
    cifar: Path, tmp_path: Path, command: Callable, start_triton: Callable
) -> None:
    check_round_trip(
        cifar, tmp_path, command, start_triton, ("--width", 128, "--depth", 4, "--heads", 4, "--epochs", 4)
    )
