import numpy as np
import torch
import torch.nn.functional as F
from sklearn.manifold import trustworthiness
from torch import Generator

from patchsight_train.judge.plane import SIDE, TILE, atlas, chosen_for_atlas, project, scatter


def groups(N: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    random = Generator().manual_seed(0)
    labels = torch.arange(N) % 3
    centers = torch.randn(3, 10, generator=random)
    return F.normalize(centers[labels] + 0.1 * torch.randn(N, 10, generator=random), dim=1), labels


def test_neighbors_stay_neighbors() -> None:
    z, labels = groups()
    points = project(z)
    assert points.shape == (90, 2)
    assert points.min() == 0
    assert points.max() == 1
    assert trustworthiness(z.numpy(), points, n_neighbors=5) > 0.9
    assert np.array_equal(points, project(z))
    dots = scatter(points, labels, ["a", "b", "c"]).axes[0].collections
    assert [len(d.get_offsets()) for d in dots] == [30, 30, 30]


def test_a_handful_of_images_has_a_map() -> None:
    assert project(groups(4)[0]).shape == (4, 2)


def test_of_many_classes_the_frequent_ones_have_a_color() -> None:
    labels = torch.cat([torch.arange(30), torch.arange(20).repeat(2)])
    legend = scatter(np.random.default_rng(0).random((70, 2)), labels, [str(i) for i in range(30)]).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["10 other classes", *map(str, range(20))]


def test_every_cell_of_the_atlas_holds_the_picture_nearest_to_its_center() -> None:
    points = np.random.default_rng(0).random((5000, 2))
    rows, cells = chosen_for_atlas(points)
    count = SIDE // TILE
    assert len({tuple(cell) for cell in cells.tolist()}) == len(rows)
    for row, cell in list(zip(rows, cells, strict=True))[::37]:
        mine = np.flatnonzero((np.minimum(points * count, count - 1).astype(int) == cell).all(axis=1))
        distance = np.abs(points * count - cell - 0.5)
        assert row == mine[np.hypot(*distance[mine].T).argmin()]


def test_pictures_lie_where_the_dots_are() -> None:
    red = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 255
    out = atlas(red, np.array([[0, 0]]))  # left, and below
    assert out.getpixel((TILE // 2, out.height - TILE // 2)) == (255, 0, 0)
    assert out.getpixel((TILE // 2, TILE // 2)) != (255, 0, 0)
