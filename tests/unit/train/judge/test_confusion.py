import torch
from sklearn.metrics import confusion_matrix
from torch import Generator

from patchsight_train.judge.confusion import confusion, confusion_chart, most_confused

NAMES = ["ape", "bee", "cat", "dog"]


def test_counts_are_scikit_learns() -> None:
    random = Generator().manual_seed(0)
    truth, predicted = (torch.randint(0, 3, (200,), generator=random) for _ in range(2))
    expected = confusion_matrix(truth.numpy(), predicted.numpy(), labels=range(4))  # class 3 is in neither
    assert confusion(truth, predicted, 4).tolist() == expected.tolist()


def test_the_commonest_mistakes_come_first_and_right_answers_are_none() -> None:
    counts = torch.tensor([[50, 3, 0, 0], [7, 9, 0, 0], [0, 0, 4, 0], [0, 0, 3, 0]])
    assert most_confused(counts, NAMES) == [("bee", "ape", 7, 16), ("ape", "bee", 3, 53), ("dog", "cat", 3, 3)]
    assert most_confused(torch.eye(4, dtype=torch.int64), NAMES) == []


def test_the_chart_names_classes_as_long_as_they_can_be_read() -> None:
    def labels(C: int) -> list[str]:
        axes = confusion_chart(torch.eye(C, dtype=torch.int64), [f"class {i}" for i in range(C)]).axes[0]
        return [text.get_text() for text in axes.get_yticklabels()]

    assert labels(4) == [f"class {i}" for i in range(4)]
    assert "class 1" not in labels(200)
