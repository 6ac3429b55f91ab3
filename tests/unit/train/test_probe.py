import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_serve.protocol import evaluate
from patchsight_train.architecture import ViTConfig
from patchsight_train.data import Images
from patchsight_train.probe import Probe, embed, knn_predict, split_probe
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


def labelled(N: int, start: int = 0, names: Any = None) -> Images:
    """Images whose pixels are all their number."""
    pixels = (start + torch.arange(N)).to(torch.uint8).view(N, 1, 1, 1).expand(-1, 3, 16, 16)
    return Images(pixels, torch.arange(N) % 3, names)


def unlabelled(N: int) -> Images:
    return Images(labelled(N).pixels, None)


def numbers(images: Images) -> list[int]:
    return images.pixels[:, 0, 0, 0].tolist()


def test_queries_are_the_test_images() -> None:
    probe = split_probe(labelled(30), labelled(9, 100), 25, 4)
    assert probe is not None
    assert numbers(probe.gallery) == list(range(25))
    assert numbers(probe.queries) == [100, 101, 102, 103]


@pytest.mark.parametrize("test", [None, unlabelled(5)], ids=["no test", "unlabelled test"])
def test_else_every_tenth_image_is_a_query(test: Images | None) -> None:
    probe = split_probe(labelled(30), test, 100, 100)
    assert probe is not None
    assert numbers(probe.queries) == [9, 19, 29]
    assert numbers(probe.gallery) == [i for i in range(30) if i not in (9, 19, 29)]
    assert probe.queries.labels is not None
    assert probe.queries.labels.tolist() == [0, 1, 2]


def test_labelled_test_images_judge_unlabelled_training() -> None:
    probe = split_probe(unlabelled(30), labelled(20, 100), 100, 100)
    assert probe is not None
    assert numbers(probe.queries) == [109, 119]


@pytest.mark.parametrize(
    ("train", "test"), [(unlabelled(30), None), (unlabelled(30), unlabelled(5)), (labelled(9), None)]
)
def test_without_labels_there_is_nothing_to_judge_by(train: Images, test: Images | None) -> None:
    assert split_probe(train, test, 100, 100) is None


def test_different_classes_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"--knn-test has the classes \['a'\], --data has \['b'\]"):
        split_probe(labelled(3, names=["b"]), labelled(3, names=["a"]), 10, 10)


def test_accuracy_is_the_share_of_right_predictions(vit: ViT, random_pixels: Tensor) -> None:
    labels = torch.arange(20) % 4
    gallery = Images(random_pixels, labels)
    wrong = Images(random_pixels[:8], torch.where(torch.arange(8) < 2, (labels[:8] + 1) % 4, labels[:8]))
    assert Probe(gallery, gallery).accuracy(vit, "cls", CPU, k=1) == 1.0
    assert Probe(gallery, wrong).accuracy(vit, "mean", CPU, k=1) == 0.75
    few = Images(random_pixels[:5], torch.zeros(5, dtype=torch.int64))
    assert Probe(few, few).accuracy(vit, "cls", CPU) == 1.0  # k is more than there are
