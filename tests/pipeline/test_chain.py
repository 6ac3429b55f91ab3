"""The whole chain on real images, by its commands: train → export → serve → embed → gallery → neighbors → k-NN."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from patchsight_export.source import read_run
from patchsight_serve.client import Client
from patchsight_serve.dataset import read_dataset
from patchsight_serve.decode import decode
from patchsight_train.data import eval_transform
from patchsight_train.probe import embed

TRAIN, TEST = 600, 200


@pytest.fixture(scope="module")
def cifar(first_of_cifar: Callable[[int, int], Path]) -> Path:
    return first_of_cifar(TRAIN, TEST)


def test_chain(cifar: Path, tmp_path: Path, command: Callable, serve: Callable[..., str]) -> None:
    run, bundle = tmp_path / "runs" / "micro", tmp_path / "model_repository" / "micro"

    trained = command(
        "patchsight-train", "simclr", "--data", cifar / "train.parquet", "--knn-test", cifar / "test.parquet",
        "--run", run, "--width", 64, "--depth", 2, "--heads", 2, "--stem", "conv", "--epochs", 4, "--batch-size", 64,
        "--warmup-epochs", 1, "--projection-hidden", 128, "--knn-every", 2, "--threads", 2,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 4 * (TRAIN // 64)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert 0.1 < metrics[-1]["knn"] < 0.6

    exported = command("patchsight-export", run, bundle)
    assert exported.returncode == 0, exported.stderr
    url = serve("--model-repository", bundle.parent, "--no-sample-gallery")

    dataset = read_dataset(cifar / "test.parquet")
    images = [dataset.read(i) for i in range(40)]
    served = check_embeddings(url, run, images)
    check_attention(url, images[0])
    check_gallery(url, images, served)
    check_knn(command, cifar, url, bundle)


def check_embeddings(url: str, run: Path, images: list[bytes]) -> np.ndarray:
    """Alone and together, by JSON and by raw floats, and as torch says."""
    with Client(url) as client:
        together = client.embed(images)
    alone = httpx.post(f"{url}/embed", content=images[3], headers={"Content-Type": "image/jpeg"}).json()
    vector = np.array(alone["results"][0]["embedding"], dtype=np.float32)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(vector, together[3] / np.linalg.norm(together[3]), atol=1e-5)

    encoder = read_run(run).encoder
    pixels = np.stack([decode(image, eval_transform(32)) for image in images])
    expected = embed(encoder, torch.from_numpy(pixels).permute(0, 3, 1, 2), "cls", torch.device("cpu")).numpy()
    unit = together / np.linalg.norm(together, axis=1, keepdims=True)
    assert (unit * expected).sum(axis=1).min() > 0.99999
    return unit


def check_attention(url: str, image: bytes) -> None:
    reply = httpx.post(f"{url}/attention", content=image, params={"head": "mean"})
    assert reply.headers["content-type"] == "image/png"
    picture = Image.open(io.BytesIO(reply.content)).convert("RGB")
    assert min(picture.size) >= 256
    assert np.asarray(picture).std() > 5  # not a flat tile


def check_gallery(url: str, images: list[bytes], unit: np.ndarray) -> None:
    """Each image finds itself, and its neighbors are those of a brute-force search."""
    for i, image in enumerate(images):
        reply = httpx.post(f"{url}/gallery/images", content=image, params={"id": f"image-{i}", "label": f"l{i % 3}"})
        assert reply.json()["results"][0]["created"] is True
    found = httpx.post(f"{url}/neighbors", content=images[7], params={"k": 5}).json()["neighbors"]
    assert found[0]["id"] == "image-7"
    assert found[0]["score"] == pytest.approx(1, abs=1e-5)
    similarity = unit @ unit[7]
    assert [n["id"] for n in found] == [f"image-{i}" for i in np.argsort(-similarity)[:5]]
    by_id = httpx.get(f"{url}/neighbors", params={"id": "image-7", "k": 4}).json()["neighbors"]
    assert [n["id"] for n in by_id] == [n["id"] for n in found[1:]]
    assert httpx.delete(f"{url}/gallery/images/image-7").is_success
    assert httpx.get(f"{url}/neighbors", params={"id": "image-7"}).status_code == 404


def check_knn(command: Callable, cifar: Path, url: str, bundle: Path) -> None:
    """The evaluation through the server equals the one in process."""
    sources = ("--train", cifar / "train.parquet", "--test", cifar / "test.parquet", "--json")
    here = command("patchsight-knn", *sources, "--model-repository", bundle.parent)
    there = command("patchsight-knn", *sources, "--server", url)
    assert here.returncode == 0, here.stderr
    assert there.returncode == 0, there.stderr
    local, remote = json.loads(here.stdout), json.loads(there.stdout)
    assert local["accuracy"] == remote["accuracy"]
    assert local["encoder"] == remote["encoder"]
    assert set(local["accuracy"]) == {"1", "5", "10", "20", "100", "200"}
    assert local["accuracy"]["20"] > 0.15  # ten classes: chance is 0.1
