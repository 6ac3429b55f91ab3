"""Which labelled images are used, and that a class has one number on all sides."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Generator

from patchsight_serve.errors import InvalidRequest
from patchsight_train.labelled import draw_balanced, open_judging, open_training


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., list[str]]:
    """`folder("train", cats=3, dogs=2)`: so many pictures of each class."""

    def folder(name: str, **counts: int) -> list[str]:
        for value, (kind, count) in enumerate(counts.items()):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((8, 8, 3), 40 * value + i, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / kind / f"{i}.png")
        return [str(tmp_path / name)]

    return folder


def numbered(path: Path, labels: list[int]) -> list[str]:
    """Parquet whose classes have no names."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    images = pa.array([{"bytes": buffer.getvalue(), "path": None}] * len(labels))
    pq.write_table(pa.table({"image": images, "label": pa.array(labels, pa.int64())}), path)
    return [str(path)]


def dealt(counts: list[int], total: int) -> list[int]:
    """How many of each class: one of each in turn, as long as it has any."""
    given = [0] * len(counts)
    while sum(given) < total:
        open_ = [c for c in range(len(counts)) if given[c] < counts[c]]
        least = min(given[c] for c in open_)
        given[next(c for c in open_ if given[c] == least)] += 1
    return given


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("counts", [[50, 50, 50], [3, 200, 40, 1], [1, 1]])
def test_classes_are_dealt_in_turn(share: float, counts: list[int], generator: Generator) -> None:
    labels = torch.tensor([c for c, count in enumerate(counts) for _ in range(count)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    drawn = draw_balanced(labels, share, seed=0)
    assert torch.equal(drawn, drawn.unique())
    wanted = dealt(counts, max(round(share * len(labels)), len(counts)))
    assert torch.bincount(labels[drawn]).tolist() == wanted
    assert torch.equal(drawn, draw_balanced(labels, share, seed=0))


def test_another_seed_draws_others_and_more_labels_keep_the_fewer() -> None:
    labels = torch.arange(300) % 3
    few, other, many = (draw_balanced(labels, share, seed) for share, seed in ((0.1, 0), (0.1, 1), (0.5, 0)))
    assert not torch.equal(few, other)
    assert set(few.tolist()) <= set(many.tolist())


def test_classes_are_matched_by_name(folder: Callable[..., list[str]]) -> None:
    train = open_training(folder("train", ants=2, bees=3, cats=2))
    assert (train.classes, train.labels.tolist()) == (3, [0, 0, 1, 1, 1, 2, 2])
    fewer = open_judging(folder("fewer", bees=1, cats=2), "--test", train)
    assert fewer.labels.tolist() == [1, 2, 2]
    more = open_judging(folder("more", aardvarks=1, ants=1, bees=1, cats=2), "--test", train)
    assert more.labels.tolist() == [3, 0, 1, 2, 2]
    assert more.class_names == ["ants", "bees", "cats", "aardvarks"]


def test_names_that_do_not_match_are_refused(folder: Callable[..., list[str]], tmp_path: Path) -> None:
    train = open_training(folder("train", ants=2, bees=3))
    with pytest.raises(InvalidRequest, match="only --test has bee, only --data has bees"):
        open_judging(folder("test", ants=2, bee=3), "--test", train)
    with pytest.raises(InvalidRequest, match="classes of --data have names, those of --val only numbers"):
        open_judging(numbered(tmp_path / "x.parquet", [0, 1]), "--val", train)


def test_classes_without_names_go_by_their_numbers(tmp_path: Path) -> None:
    train = open_training(numbered(tmp_path / "train.parquet", [2, 0, -1, 2]))
    assert (train.classes, train.rows.tolist(), train.labels.tolist()) == (3, [0, 1, 3], [2, 0, 2])
    assert open_judging(numbered(tmp_path / "test.parquet", [4, 1]), "--test", train).labels.tolist() == [4, 1]


def test_what_cannot_be_learned_is_refused(folder: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="all labelled images are of one class"):
        open_training(folder("one", ants=4))
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "loose.png")
    with pytest.raises(InvalidRequest, match="--data .*: no labels, or not the same classes"):
        open_training([str(tmp_path / "one")])


def test_decoded_images_keep_their_labels_where_one_is_broken(folder: Callable[..., list[str]], tmp_path: Path) -> None:
    sources = folder("train", ants=3, bees=3)
    (tmp_path / "train" / "ants" / "1.png").write_bytes(b"no image")
    Image.new("L", (9, 8), 7).save(tmp_path / "train" / "bees" / "0.png")
    said = io.StringIO()
    images = open_training(sources).decode(8, Console(file=said, width=200))
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.pixels.float().mean(dim=(1, 2, 3)).tolist() == [0, 2, 7, 41, 42]
    assert "skipped ants/1.png" in said.getvalue()
