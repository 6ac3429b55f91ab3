import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Generator, Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.protocol import evaluate
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_train.architecture import ViTConfig
from patchsight_train.data import Images, load_images
from patchsight_train.probe import Probe, embed, knn_predict, load_probe
from patchsight_train.views import eval_view
from patchsight_train.vit import ViT

CPU = torch.device("cpu")


def brute_force(gallery: Tensor, labels: Tensor, queries: Tensor, k: int) -> list[int]:
    """The protocol, query by query: nearest by cosine, ties by row, votes exp(similarity / 0.07), ties by class."""
    predicted = []
    for query in queries.numpy():
        similarity = [float(np.dot(query, row)) for row in gallery.numpy()]
        best = sorted(range(len(similarity)), key=lambda row: (-similarity[row], row))[:k]
        votes: dict[int, float] = {}
        for row in best:
            label = int(labels[row])
            votes[label] = votes.get(label, 0.0) + math.exp(similarity[row] / 0.07)
        predicted.append(min(votes, key=lambda label: (-votes[label], label)))
    return predicted


def clustered(N: int, generator: Generator, D: int = 12, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Unit vectors about the corners of a simplex, so close that neighbors disagree."""
    labels = torch.randint(0, classes, (N,), generator=generator)
    vectors = torch.eye(classes, D)[labels] + 0.5 * torch.randn(N, D, generator=generator)
    return torch.nn.functional.normalize(vectors, dim=1), labels


@pytest.mark.parametrize("k", [1, 5, 20, 150])
def test_predictions_are_those_of_brute_force(k: int, generator: Generator) -> None:
    gallery, labels = clustered(150, generator)
    queries, truth = clustered(40, generator)
    predicted = knn_predict(gallery, labels, queries, k)
    assert predicted.tolist() == brute_force(gallery, labels, queries, k)
    assert 0.2 < (predicted == truth).float().mean() < 1


def test_predictions_are_those_of_the_server(generator: Generator) -> None:
    gallery, labels = clustered(400, generator)
    queries, truth = clustered(1_100, generator)  # more than a chunk
    figures = evaluate(gallery.numpy(), labels.numpy(), queries.numpy(), truth.numpy())
    for k, expected in figures.predictions.items():
        assert knn_predict(gallery, labels, queries, k).tolist() == expected.tolist()


def test_equal_similarities_go_by_row_and_equal_votes_by_class() -> None:
    gallery = torch.eye(4)[[0, 1, 1, 1, 2, 1]]
    query = torch.eye(4)[1:2]
    assert knn_predict(gallery, torch.tensor([0, 3, 2, 2, 1, 2]), query, 1).tolist() == [3]
    assert knn_predict(gallery, torch.tensor([0, 3, 2, 2, 1, 2]), query, 2).tolist() == [2]
    assert knn_predict(gallery, torch.tensor([0, 3, 3, 2, 1, 2]), query, 4).tolist() == [2]
    many = torch.eye(2)[[0]].expand(3_000, -1)
    labels = torch.arange(3_000) // 7
    assert knn_predict(many, labels, many[:1], 7).tolist() == [0]


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2, registers=2))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_embeddings_are_normalized_tokens(vit: ViT, pooling: str, random_pixels: Tensor) -> None:
    found = embed(vit, random_pixels, pooling, CPU, batch=7)
    tokens = vit(eval_view(random_pixels))
    expected = tokens[:, 0] if pooling == "cls" else sum(tokens[:, 3 + i] for i in range(16)) / 16
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=0)
    assert not found.requires_grad
    assert vit.training  # as it was before


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., str]:
    """`source("train", labels, first=0, names=None)`: Parquet of PNGs, each all over of its number."""

    def source(name: str, labels: list[int | None] | None, first: int = 0, names: list[str] | None = None) -> str:
        images = []
        for i in range(len(labels or range(30))):
            png = io.BytesIO()
            Image.fromarray(np.full((20, 24, 3), first + i, dtype=np.uint8)).save(png, "PNG")
            images.append({"bytes": png.getvalue(), "path": f"{first + i}"})
        columns = {"image": images} | ({} if labels is None else {"label": pa.array(labels, pa.int64())})
        table = pa.table(columns)
        if names is not None:
            metadata = {"info": {"features": {"label": {"names": names}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        return str(tmp_path / f"{name}.parquet")

    return source


@pytest.fixture
def load() -> Callable[..., Probe | None]:
    """`load(train, test="", most_gallery=100, most_queries=100, limit=None)`, at 16 px."""

    def load(
        train: str, test: str = "", most_gallery: int = 100, most_queries: int = 100, limit: int | None = None
    ) -> Probe | None:
        console = Console(file=io.StringIO())
        return load_probe([train], [test] if test else [], 16, most_gallery, most_queries, console, limit)

    return load


def numbers(images: Images) -> list[int]:
    assert images.pixels.shape[1:] == (3, 16, 16)
    return images.pixels[:, 0, 0, 0].tolist()


THIRDS = [i % 3 for i in range(30)]


def test_queries_are_the_test_images(source: Callable[..., str], load: Callable[..., Probe]) -> None:
    probe = load(source("train", THIRDS), source("test", THIRDS[:9], 100))
    assert numbers(probe.gallery) == list(range(30))
    assert numbers(probe.queries) == list(range(100, 109))
    assert probe.gallery.labels.tolist() == THIRDS
    assert probe.queries.labels.tolist() == THIRDS[:9]


def test_of_too_many_a_random_subset_is_taken_always_the_same(
    source: Callable[..., str], load: Callable[..., Probe]
) -> None:
    sources = source("train", sorted(THIRDS)), source("test", sorted(THIRDS), 100)
    probe, again = load(*sources, 15, 6), load(*sources, 15, 6)
    for images, first, count in ((probe.gallery, 0, 15), (probe.queries, 100, 6)):
        chosen = numbers(images)
        assert len(chosen) == count
        assert chosen == sorted(set(chosen))
        assert images.labels.tolist() == [sorted(THIRDS)[n - first] for n in chosen]
        assert set(images.labels.tolist()) == {0, 1, 2}  # in order, the first would all be of the first classes
    assert numbers(probe.gallery) == numbers(again.gallery)
    assert numbers(probe.queries) == numbers(again.queries)


@pytest.mark.parametrize("test", ["none", "unlabelled"])
def test_else_every_tenth_image_is_a_query(test: str, source: Callable[..., str], load: Callable[..., Probe]) -> None:
    probe = load(source("train", THIRDS), "" if test == "none" else source("test", None, 100))
    assert numbers(probe.queries) == [9, 19, 29]
    assert numbers(probe.gallery) == [i for i in range(30) if i not in (9, 19, 29)]
    assert probe.queries.labels.tolist() == [0, 1, 2]


def test_labelled_test_images_judge_unlabelled_training(source: Callable[..., str], load: Callable[..., Probe]) -> None:
    probe = load(source("train", None), source("test", THIRDS[:20], 100))
    assert numbers(probe.queries) == [109, 119]
    assert numbers(probe.gallery) == [n for n in range(100, 120) if n not in (109, 119)]


def test_only_labelled_rows_take_part(source: Callable[..., str], load: Callable[..., Probe]) -> None:
    some = [label if i % 3 else (None if i % 2 else -1) for i, label in enumerate(THIRDS)]
    probe = load(source("train", some), source("test", [1, None, 2], 100))
    assert numbers(probe.gallery) == [i for i in range(30) if i % 3]
    assert numbers(probe.queries) == [100, 102]
    assert numbers(load(source("train", some)).queries) == [14, 29]  # the tenth and twentieth of the labelled


def test_the_limit_is_that_of_training(source: Callable[..., str], load: Callable[..., Probe]) -> None:
    probe = load(source("train", THIRDS), source("test", THIRDS, 100), limit=12)
    assert numbers(probe.gallery) == list(range(12))
    assert len(probe.queries) == 30


def test_pixels_are_those_of_the_eval_transform() -> None:
    probe = load_probe([str(SAMPLES)], [], 24, 50, 10, Console(file=io.StringIO()))
    assert probe is not None
    truth = load_images([str(SAMPLES)], 24, None, Console(file=io.StringIO()))
    for images in (probe.gallery, probe.queries):
        for pixels, label in zip(images.pixels, images.labels, strict=True):
            same = (truth.pixels == pixels).flatten(1).all(dim=1).nonzero().squeeze(1)
            assert label in truth.labels[same]


@pytest.mark.parametrize(("train", "test"), [(None, False), (None, True), (THIRDS[:9], False)])
def test_without_labels_there_is_nothing_to_judge_by(
    train: list[int] | None, test: bool, source: Callable[..., str], load: Callable[..., Probe | None]
) -> None:
    assert load(source("train", train), source("test", None) if test else "") is None


def test_different_classes_are_refused(source: Callable[..., str], load: Callable[..., Probe]) -> None:
    sources = source("train", [0, 0], names=["b"]), source("test", [0, 0], names=["a"])
    with pytest.raises(InvalidRequest, match=r"--knn-test has the classes \['a'\], --data has \['b'\]"):
        load(*sources)


def test_accuracy_is_the_share_of_right_predictions(vit: ViT, random_pixels: Tensor) -> None:
    labels = torch.arange(20) % 4
    gallery = Images(random_pixels, labels)
    wrong = Images(random_pixels[:8], torch.where(torch.arange(8) < 2, (labels[:8] + 1) % 4, labels[:8]))
    assert Probe(gallery, gallery).accuracy(vit, "cls", CPU, k=1) == 1.0
    assert Probe(gallery, wrong).accuracy(vit, "mean", CPU, k=1) == 0.75
    few = Images(random_pixels[:5], torch.zeros(5, dtype=torch.int64))
    assert Probe(few, few).accuracy(vit, "cls", CPU) == 1.0  # k is more than there are
