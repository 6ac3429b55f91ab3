import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import mutual_info_score
from torch import Generator, Tensor

from patchsight_train.data import Images
from patchsight_train.judge.units import (
    class_information,
    equally_filled,
    off_diagonal_correlation,
    plug_in_information,
    strongest_images,
    unit_sheet,
)


def drawn(joint: list[list[float]], N: int, generator: Generator) -> tuple[Tensor, Tensor, float]:
    """N pairs of a value (the row) and a class (the column) with these probabilities; their information in bits."""
    p = np.array(joint)
    cells = torch.multinomial(torch.from_numpy(p).flatten(), N, replacement=True, generator=generator)
    told = sum(
        p[i, j] * math.log2(p[i, j] / (p[i].sum() * p[:, j].sum())) for i, j in np.argwhere(p > 0)
    )  # fmt: skip
    return (cells // p.shape[1]).double()[:, None], cells % p.shape[1], told


def test_counted_information_is_scikit_learns(generator: Generator) -> None:
    bin_of = torch.randint(0, 7, (5, 300), generator=generator)
    y = torch.randint(0, 4, (300,), generator=generator)
    expected = [mutual_info_score(row.numpy(), y.numpy()) / math.log(2) for row in bin_of]
    np.testing.assert_allclose(plug_in_information(bin_of, y, 7).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("N", [1000, 20_000])
def test_information_of_a_known_table(N: int, generator: Generator) -> None:
    tables = [
        [[0.25, 0.25], [0.25, 0.25]],
        [[0.4, 0.1], [0.1, 0.4]],
        [[0.5, 0.0], [0.0, 0.5]],
        [[0.2, 0.1, 0.0], [0.05, 0.2, 0.05], [0.0, 0.1, 0.3]],
    ]
    for table in tables:
        values, labels, told = drawn(table, N, generator)
        found = class_information(values, labels, bins=len(table))
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(told, abs=3 / math.sqrt(N))


@pytest.mark.parametrize(("N", "C"), [(400, 10), (2000, 10), (2000, 200)])
def test_units_that_know_nothing_tell_nothing(N: int, C: int, generator: Generator) -> None:
    z = torch.randn(N, 100, generator=generator)
    labels = torch.randint(0, C, (N,), generator=generator)
    counted = plug_in_information(equally_filled(z.double(), 20), labels, 20).mean()
    found = class_information(z, labels)
    assert found.min() >= 0
    assert found.mean() < 0.025
    assert found.mean() < 0.06 * counted  # which looks like knowledge


def test_a_unit_for_each_class_is_found(generator: Generator) -> None:
    labels = torch.arange(1000) % 4
    z = torch.nn.functional.one_hot(labels, 4) + 0.01 * torch.randn(1000, 4, generator=generator)
    one_of_four = 0.25 * math.log2(4) + 0.75 * math.log2(4 / 3)
    assert class_information(z, labels).tolist() == pytest.approx([one_of_four] * 4, abs=0.05)
    assert class_information(labels[:, None].float(), labels).item() == pytest.approx(2, abs=0.01)


def test_only_the_order_of_values_counts(generator: Generator) -> None:
    z = torch.randn(500, 70, generator=generator)  # more than a chunk of units
    labels = (z[:, 0] > 0).long() + 2 * (z[:, 69] > 1)
    found = class_information(z, labels)
    assert torch.equal(found, class_information(z.exp(), labels))
    assert found[[0, 69]].min() > 10 * found[1:69].mean()
    assert torch.equal(class_information(z[:, [69]], labels), found[[69]])  # one unit or many
    order = torch.randperm(500, generator=generator)
    torch.testing.assert_close(class_information(z[order], labels[order]), found, atol=0.05, rtol=0)
    named = torch.tensor([7, 40, 3, 12])[labels]  # classes need not be 0..C − 1
    torch.testing.assert_close(class_information(z, named), found, atol=0.05, rtol=0)


def test_bins_are_equally_filled_but_equal_values_share_one() -> None:
    values = torch.stack([torch.arange(100.0).flip(0), torch.arange(100).clamp(min=60).double()], dim=1)
    first, second = equally_filled(values, 10)
    assert first.bincount().tolist() == [10] * 10
    assert first.tolist() == sorted(first.tolist(), reverse=True)
    assert len(set(second[:61].tolist())) == 1
    assert second[61:].bincount().tolist()[6:] == [9, 10, 10, 10]  # none of them with the many
    assert 6 not in second[:61]
    assert equally_filled(torch.arange(3.0)[:, None], 20).max() < 20  # fewer images than bins


def test_images_without_a_label_are_left_out(generator: Generator) -> None:
    z, labels = torch.randn(300, 5, generator=generator), torch.randint(0, 3, (300,), generator=generator)
    some = torch.where(torch.arange(300) % 3 == 0, -1, labels)
    assert torch.equal(class_information(z, some), class_information(z[some >= 0], some[some >= 0]))
    assert class_information(z, torch.full((300,), -1)).isnan().all()


def test_a_unit_that_is_not_finite_has_no_figure(generator: Generator) -> None:
    z, labels = torch.randn(60, 3, generator=generator), torch.arange(60) % 2
    z[5, 1] = math.nan
    assert class_information(z, labels).isnan().tolist() == [False, True, False]
    assert class_information(torch.ones(60, 2), labels).tolist() == [0, 0]
    assert math.isnan(off_diagonal_correlation(z))


def test_correlation_is_numpys(generator: Generator) -> None:
    z = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 5
    table = np.abs(np.corrcoef(z.double().numpy(), rowvar=False))
    expected = table[~np.eye(12, dtype=bool)].mean()
    assert off_diagonal_correlation(z) == pytest.approx(expected, rel=1e-12)
    assert off_diagonal_correlation(z * torch.arange(1, 13) - 3) == pytest.approx(expected, rel=1e-5)
    constant = torch.cat([z, torch.full((200, 2), 0.1)], dim=1)
    assert off_diagonal_correlation(constant) == pytest.approx(expected, rel=1e-12)


def test_correlation_from_repeated_to_independent_units(generator: Generator) -> None:
    z = torch.randn(5000, 1, generator=generator)
    assert off_diagonal_correlation(z * torch.tensor([1.0, -2.0, 3.0])) == pytest.approx(1)
    independent = off_diagonal_correlation(torch.randn(5000, 30, generator=generator))
    assert independent == pytest.approx(math.sqrt(2 / (math.pi * 5000)), rel=0.1)
    assert math.isnan(off_diagonal_correlation(z))
    assert math.isnan(off_diagonal_correlation(torch.ones(9, 4)))


def test_strongest_images_of_each_unit(generator: Generator) -> None:
    z = torch.randn(50, 130, generator=generator)
    found = strongest_images(z, 4)
    assert found.dtype == torch.int64
    assert torch.equal(found, z.topk(4, dim=0).indices.T)
    ties = torch.tensor([[1.0], [2.0], [math.nan], [2.0], [-math.inf]])
    assert strongest_images(ties, 9).tolist() == [[1, 3, 0, 2, 4]]


def test_a_sheet_shows_the_strongest_images(photos: Images) -> None:
    z = torch.zeros(len(photos), 3)
    z[:, 0] = torch.arange(len(photos))
    z[7, 2] = 1
    sheet = unit_sheet(photos.pixels, z, [2, 0], photos.labels, photos.class_names, count=3)
    canvas = np.asarray(sheet)
    last = len(photos) - 1
    for row in ([7, 0, 1], [last, last - 1, last - 2]):
        places = [_place(canvas, photos.pixels[i]) for i in row]
        assert len({y for y, _ in places}) == 1
        assert [x for _, x in places] == sorted(x for _, x in places)


def _place(canvas: np.ndarray, picture: Tensor) -> tuple[int, int]:
    """Top and left of the picture, each of whose pixels is a square."""
    for times in range(1, 6):
        tile = np.kron(picture.permute(1, 2, 0).numpy(), np.ones((times, times, 1), np.uint8))
        h, w, _ = tile.shape
        for y, x in np.argwhere((canvas == tile[0, 0]).all(axis=2)).tolist():
            if canvas[y : y + h, x : x + w].shape == tile.shape and (canvas[y : y + h, x : x + w] == tile).all():
                return y, x
    raise AssertionError("not in the sheet")


@pytest.mark.parametrize("labels", [None, torch.full((12,), -1), torch.arange(12) % 2])
@pytest.mark.parametrize("S", [8, 32, 96])
def test_a_sheet_needs_neither_labels_nor_names(labels: Tensor | None, S: int, generator: Generator) -> None:
    pixels = torch.randint(0, 256, (12, 3, S, S), dtype=torch.uint8, generator=generator)
    sheet = unit_sheet(pixels, torch.randn(12, 4, generator=generator), [0, 3], labels, None)
    assert isinstance(sheet, Image.Image)
    assert sheet.width < 1300
