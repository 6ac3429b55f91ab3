from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from patchsight_serve import protocol
from patchsight_train.accuracy import Accuracy, classify, measure, wilson
from patchsight_train.build import build_encoder
from patchsight_train.classification import Classification
from patchsight_train.data import Images
from patchsight_train.finetune_settings import FineTuneSettings


@pytest.fixture
def objective(tiny: Callable[..., dict[str, Any]]) -> Classification:
    settings = FineTuneSettings(**tiny("finetune", test=["unread"], scratch=True))
    torch.manual_seed(0)
    objective = Classification(build_encoder(settings.architecture), 3, settings)
    torch.nn.init.normal_(objective.head.weight)
    return objective


@pytest.mark.parametrize(("right", "total"), [(0, 3), (3, 3), (1, 2), (5092, 10_000)])
def test_the_interval_is_that_of_the_knn_protocol(right: int, total: int) -> None:
    assert wilson(right, total) == pytest.approx(protocol.wilson(right, total), abs=1e-12)


def test_classes_without_images_are_left_out() -> None:
    found = Accuracy(torch.tensor([1, 0, 2, 0]), torch.tensor([2, 0, 2, 1]))
    assert found.top1 == 3 / 5
    wanted = {
        "a": {"accuracy": 0.5, "images": 2},
        "c": {"accuracy": 1.0, "images": 2},
        "d": {"accuracy": 0.0, "images": 1},
    }
    assert found.per_class(["a", "b", "c", "d"]) == wanted
    assert found.per_class(None).keys() == {"0", "2", "3"}


def test_what_is_predicted_is_counted(objective: Classification, random_pixels: Tensor) -> None:
    predicted = classify(objective, random_pixels, torch.device("cpu"))
    assert objective.training
    labels = predicted.clone()
    labels[:5] = (labels[:5] + 1) % 3
    found = measure(objective, Images(random_pixels, labels), torch.device("cpu"))
    assert (found.top1, int(found.total.sum())) == (0.75, 20)


def test_a_class_that_the_head_lacks_is_never_right(objective: Classification, random_pixels: Tensor) -> None:
    found = measure(objective, Images(random_pixels[:3], torch.full((3,), 7)), torch.device("cpu"))
    assert (found.top1, found.per_class(None)) == (0.0, {"7": {"accuracy": 0.0, "images": 3}})
