import pytest
import torch
from torch import Generator, Tensor

from patchsight_train.randomness import Randomness
from patchsight_train.views import View, augment

FULL = View(16, (0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.3, blur=0.5, solarize=0.3)


def seeded(seed: int = 7) -> Generator:
    return Generator().manual_seed(seed)


def test_numbers_are_uniform_float32_one_row_an_image() -> None:
    found = Randomness(seeded()).rand(2_000, 3, 2)
    assert found.shape == (2_000, 3, 2)
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() < 1
    assert abs(found.mean() - 0.5) < 4 / (12 * found.numel()) ** 0.5


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_ranks_draw_the_rows_of_one_rank(ranks: int) -> None:
    """Through a whole sequence of draws: none may leave the ranks' generators in different states."""

    def draws(random: Randomness, B: int) -> list[Tensor]:
        order = torch.tensor(random.permutation(5)).expand(B, -1)
        return [random.rand(B), order, random.rand(B, 4, 2), random.rand(B, 1)]

    b = 12 // ranks
    whole = draws(Randomness(seeded()), 12)
    shares = [draws(Randomness(seeded(), slice(r * b, r * b + b), 12), b) for r in range(ranks)]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([share[i] for share in shares]), expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_views_do_not_depend_on_the_split(ranks: int) -> None:
    images = torch.randint(0, 256, (12, 3, 20, 24), dtype=torch.uint8, generator=seeded(1))
    b = 12 // ranks
    whole = augment(images, FULL, Randomness(seeded()))
    for r in range(ranks):
        rows = slice(r * b, r * b + b)
        share = augment(images[rows], FULL, Randomness(seeded(), rows, 12))
        torch.testing.assert_close(share, whole[rows], atol=1e-6, rtol=0)


def test_an_image_gets_its_view_whatever_the_others_are() -> None:
    first = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=seeded(1))
    second = first.clone()
    second[1:] = 255 - second[1:]
    a, b = (augment(images, FULL, Randomness(seeded())) for images in (first, second))
    torch.testing.assert_close(a[0], b[0], atol=1e-6, rtol=0)
    assert not torch.allclose(a[1:], b[1:])


def test_a_permutation_is_one_of_all_and_follows_the_seed() -> None:
    random = Randomness(seeded())
    seen = {tuple(random.permutation(3)) for _ in range(100)}
    assert len(seen) == 6
    assert all(sorted(order) == [0, 1, 2] for order in seen)
    assert Randomness(seeded()).permutation(9) == Randomness(seeded()).permutation(9)


def test_rows_that_are_not_of_the_batch_are_an_error() -> None:
    with pytest.raises(ValueError, match="5 images asked for random numbers, this rank holds 4"):
        Randomness(seeded(), slice(4, 8), 8).rand(5)
    with pytest.raises(ValueError, match="3 images asked for random numbers, this rank holds 2"):
        Randomness(seeded(), slice(0, 2), None).rand(3)
