import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Generator, Tensor

from patchsight_train.multi_crop import GLOBAL, batches, crops, cut, entropy, swapped_loss
from patchsight_train.objective import Objective
from patchsight_train.objective_settings import DINOSettings
from patchsight_train.randomness import Randomness
from patchsight_train.settings import MultiCrop


def dino(**changes: object) -> MultiCrop:
    return DINOSettings(**{"data": ["unread"]} | changes)  # type: ignore[arg-type]


def numbered(B: int, sizes: list[int]) -> list[Tensor]:
    """Views `(B, 3, S, S)` whose pixels say which one and whose: 1,000 · view + image."""
    return [
        (1_000.0 * j + torch.arange(B)).view(B, 1, 1, 1).expand(B, 3, size, size).clone()
        for j, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("local_crops", [0, 1, 6])
def test_two_global_views_come_before_the_local_ones(local_crops: int) -> None:
    settings = dino(image_size=96, patch_size=8, local_crops=local_crops, crop_scale=(0.5, 1.0), local_scale=(0.1, 0.5))
    found = crops(settings)
    assert [(view.size, view.scale) for view in found[:GLOBAL]] == [(96, (0.5, 1.0))] * 2
    assert [(view.size, view.scale) for view in found[GLOBAL:]] == [(48, (0.1, 0.5))] * local_crops


def test_color_distortions_are_those_of_byol() -> None:
    """The pair of its App. B on the global views: blur always and never, solarization on the second alone."""
    first, second, local = crops(dino(image_size=64, patch_size=8, local_crops=1))
    for view in (first, second, local):
        assert (view.jitter, view.jitter_p, view.gray, view.flip) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.5)
    assert [view.blur for view in (first, second, local)] == [1.0, 0.1, 0.5]
    assert [view.solarize for view in (first, second, local)] == [0.0, 0.2, 0.0]
    assert {view.blur for view in crops(dino(image_size=32))} == {0.0}  # it would erase so small a picture


def test_views_are_cut_for_each_image(random_pixels: Tensor, generator: Generator) -> None:
    views = cut(random_pixels, crops(dino(image_size=16, local_crops=3)), Randomness(generator))
    assert [v.shape for v in views] == [(20, 3, 16, 16)] * 2 + [(20, 3, 8, 8)] * 3
    assert all((a - b).abs().amax() > 0.1 for a, b in pairwise(views[2:]))


@pytest.mark.parametrize("micro_batch", [None, 1, 3, 7, 20])
@pytest.mark.parametrize("sizes", [[16, 16], [16, 16, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8], [16, 16, 16, 12], [16, 16, 20]])
def test_every_image_of_every_view_is_seen_once(micro_batch: int | None, sizes: list[int]) -> None:
    seen = []
    for x, pieces in batches(numbered(7, sizes), micro_batch):
        assert len({sizes[j] for j, _ in pieces}) == 1
        names = [1_000 * j + i for j, rows in pieces for i in range(rows.start, rows.stop)]
        assert x[:, 0, 0, 0].tolist() == names  # the pictures are those that the pieces name
        assert x.shape == (len(names), 3, sizes[pieces[0][0]], sizes[pieces[0][0]])
        seen += names
    assert sorted(seen) == sorted(1_000 * j + i for j in range(len(sizes)) for i in range(7))


@pytest.mark.parametrize("micro_batch", [None, 1, 3, 7, 20])
def test_the_largest_batch_is_that_of_the_global_views(micro_batch: int | None) -> None:
    """Whatever the number of local crops; and without micro-batches the first batch is the global views."""
    for local_crops in range(12):
        views = numbered(7, [16, 16] + [8] * local_crops)
        pixels = [x.numel() for x, _ in batches(views, micro_batch)]
        assert max(pixels) == pixels[0] == GLOBAL * min(micro_batch or 7, 7) * 3 * 16**2
    if micro_batch is None:
        assert torch.equal(next(batches(views, None))[0], torch.cat(views[:GLOBAL]))


def test_local_crops_share_batches() -> None:
    """As many as fit: eight of a quarter of the area, not one at a time."""
    assert [len(pieces) for _, pieces in batches(numbered(4, [16, 16] + [8] * 11), None)] == [2, 8, 3]


class LiveNumbers:
    """The most numbers that were kept for backward passes at one time, while it is on."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> "LiveNumbers":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: Saved(self, t), lambda saved: saved.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.__exit__()


class Saved:
    def __init__(self, live: LiveNumbers, tensor: Tensor) -> None:
        self.live, self.tensor = live, tensor
        live.now += tensor.numel()
        live.most = max(live.most, live.now)

    def __del__(self) -> None:
        self.live.now -= self.tensor.numel()


@pytest.mark.parametrize("name", ["dino", "swav"])
def test_memory_does_not_grow_with_the_number_of_local_crops(
    name: str, random_pixels: Tensor,
    objective: Callable[..., Objective], views: Callable[..., list[Tensor]], backward: Callable[..., dict[str, Tensor]],
) -> None:  # fmt: skip
    """What the graph keeps at its peak, with 2, 10 and 20 of them: all in one graph it would be 3 times as much."""
    peaks = []
    for local_crops in (2, 10, 20):
        model = objective(name, image_size=32, local_crops=local_crops, depth=2)
        seen = views(model, 0, random_pixels.repeat_interleave(2, -1).repeat_interleave(2, -2))
        with LiveNumbers() as live:
            backward(model, seen)
        assert live.now == 0
        peaks.append(live.most)
    assert peaks[2] == peaks[1] < 1.15 * peaks[0]


def test_loss_is_a_loop_over_the_pairs_of_different_views(generator: Generator) -> None:
    """In batches of any make: each pair of a target and another view counts once, images are averaged."""
    B, K, tau, V = 5, 7, 0.3, 4
    scores, targets = torch.randn(V, B, K, generator=generator), torch.rand(2, B, K, generator=generator)
    targets = targets / targets.sum(dim=-1, keepdim=True)
    expected = 0.0
    for i, of_target in enumerate(targets.tolist()):
        for v, of_view in enumerate(scores.tolist()):
            for t, s in zip(of_target, of_view, strict=True):
                weights = [math.exp(score / tau) for score in s]
                H = -sum(p * math.log(weight / sum(weights)) for p, weight in zip(t, weights, strict=True))
                expected += H / B if v != i else 0
    both = [(0, slice(0, 5)), (1, slice(0, 5))]
    made = [both, [(2, slice(0, 2)), (3, slice(0, 2))], [(3, slice(2, 5)), (2, slice(2, 5))]]
    found = torch.zeros(())
    for pieces in made:
        found += swapped_loss(torch.cat([scores[j][rows] for j, rows in pieces]), pieces, list(targets), tau)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_scores_are_compared_in_float32(generator: Generator) -> None:
    scores = torch.randn(4, 9, generator=generator).bfloat16()
    targets = [torch.full((2, 9), 1 / 9)] * 2
    pieces = [(0, slice(0, 2)), (1, slice(0, 2))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = swapped_loss(scores, pieces, targets, 0.1)
    assert found.dtype == torch.float32
    assert torch.equal(found, swapped_loss(scores.float(), pieces, targets, 0.1))


def test_entropy_in_nats() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(entropy(p), torch.tensor([0.0, math.log(4), math.log(2)]))
