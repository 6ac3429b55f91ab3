import math
from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from patchsight_train.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    color_jitter,
    grayscale,
    jitter_factors,
    solarize,
)
from patchsight_train.randomness import Randomness
from patchsight_train.resample import convolved, cut, cut_one_by_one, gaussian_blur, resized_crop
from patchsight_train.views import View, apply, augment, draw, eval_view, normalize, random_boxes

STILL = View(size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)  # a view without any randomness


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def column(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def noise(B: int, height: int, width: int) -> Tensor:
    return torch.rand(B, 3, height, width, generator=Generator().manual_seed(8))


@pytest.mark.parametrize("S", [7, 16, 40])
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("flipped", [False, True])
def test_resized_crop_is_that_of_torchvision(S: int, filter: str, flipped: bool) -> None:
    x = noise(6, 32, 48)
    boxes = torch.tensor([[0, 0, 32, 48], [3, 5, 11, 17], [31, 47, 1, 1], [0, 40, 32, 8], [10, 0, 2, 48], [4, 4, S, S]])
    boxes[5, 2:] = boxes[5, 2:].clamp(max=28)
    found = resized_crop(x, boxes, S, filter, torch.full((6,), flipped))
    for picture, box, ours in zip(x.double(), boxes.tolist(), found, strict=True):
        # In float64: torchvision's own coordinates in float32 are off by more than ours, up to 2e-5 at 224 pixels.
        theirs = TF.resized_crop(picture, *box, [S, S], interpolation=InterpolationMode(filter), antialias=True)
        same(ours.double(), TF.horizontal_flip(theirs) if flipped else theirs)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
@pytest.mark.parametrize("S", [7, 16, 40])
def test_pictures_cut_one_by_one_are_those_of_pillow(S: int, filter: str) -> None:
    images = (noise(6, 32, 48) * 255).round().to(torch.uint8)
    boxes = torch.tensor([[0, 0, 32, 48], [3, 5, 11, 17], [31, 47, 1, 1], [0, 40, 32, 8], [10, 0, 2, 48], [4, 4, 9, 9]])
    flips = torch.tensor([True, False] * 3)
    found = cut_one_by_one(images, boxes, S, filter, flips)
    for picture, (top, left, h, w), flip, view in zip(images, boxes.tolist(), flips.tolist(), found, strict=True):
        box = to_pil_image(picture).crop((left, top, left + w, top + h))
        theirs = pil_to_tensor(box.resize((S, S), getattr(Image.Resampling, filter.upper())))
        off = ((view.flip(-1) if flip else view) * 255 - theirs).abs()  # levels of 255
        # Both cut bicubic's overshoot between the axes, but Pillow takes the axis that shrinks first.
        assert (off > 1.01).float().mean() < (0.02 if filter == "bicubic" else 1e-9)
        assert off.mean() < 0.5
    exact = resized_crop(images.float() / 255, boxes, S, filter, flips).clamp(0, 1)
    assert (found - exact).abs().mean() < 1 / 255  # rounded and cut to 0..1 between the axes, as Pillow does
    assert torch.equal(cut(images, boxes, S, filter, flips), found)


def test_a_batch_is_augmented_as_its_parts(random_pixels: Tensor) -> None:
    random = Randomness(Generator().manual_seed(1))
    images = random_pixels.repeat(2, 1, 1, 1)  # more than a CPU takes at once
    drawn = draw(len(images), 16, 16, FULL, random)
    whole = apply(images, FULL, drawn)
    parts = torch.cat([apply(images[i : i + 1], FULL, drawn[i : i + 1]) for i in range(len(images))])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert torch.equal(
        augment(images, FULL, Randomness(Generator().manual_seed(1))),
        torch.cat([apply(images[rows], FULL, drawn[rows]) for rows in (slice(0, 16), slice(16, 32), slice(32, 40))]),
    )


def test_each_image_is_flipped_by_its_own_coin() -> None:
    x = noise(3, 16, 16)
    whole = torch.tensor([[0, 0, 16, 16]]).expand(3, -1)
    found = resized_crop(x, whole, 16, "bicubic", torch.tensor([True, False, True]))
    same(found, torch.stack([x[0].flip(-1), x[1], x[2].flip(-1)]))


FACTORS = [0.0, 0.3, 0.77, 1.0, 1.4, 2.0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (adjust_brightness, TF.adjust_brightness),
        (adjust_contrast, TF.adjust_contrast),
        (adjust_saturation, TF.adjust_saturation),
    ],
)
def test_color_operators_are_those_of_torchvision(pictures: Tensor, ours, theirs) -> None:  # type: ignore[no-untyped-def]
    for shift in range(len(FACTORS)):  # every picture meets every factor
        factors = FACTORS[shift:] + FACTORS[:shift]
        found = ours(pictures, column(*factors))
        for picture, factor, mine in zip(pictures, factors, found, strict=True):
            same(mine, theirs(picture, factor))


def test_hue_is_that_of_torchvision(pictures: Tensor) -> None:
    shifts = [-0.5, -0.21, -0.02, 0.0, 0.1, 0.5]
    for turn in range(len(shifts)):
        factors = shifts[turn:] + shifts[:turn]
        found = adjust_hue(pictures, column(*factors))
        for picture, factor, mine in zip(pictures, factors, found, strict=True):
            same(mine, TF.adjust_hue(picture, factor))


def test_hue_of_gray_black_and_white_stays(pictures: Tensor) -> None:
    same(adjust_hue(pictures, column(*[0.3] * 6))[2:5], pictures[2:5])


def test_grayscale_is_that_of_torchvision(pictures: Tensor) -> None:
    same(grayscale(pictures), TF.rgb_to_grayscale(pictures, num_output_channels=3))


def test_solarize_is_that_of_torchvision(pictures: Tensor) -> None:
    for threshold in (0.0, 0.5, 0.8):
        same(solarize(pictures, threshold), torch.stack([TF.solarize(p, threshold) for p in pictures]))


@pytest.mark.parametrize("S", [12, 40, 96])
def test_blur_is_that_of_torchvision(S: int) -> None:
    """By shifts, and by the matrices that other devices get."""
    x, sigmas = noise(4, S, S), torch.tensor([0.1, 0.4, 1.0, 2.0])
    kernel = 2 * max(S // 20, 1) + 1
    expected = [TF.gaussian_blur(p, [kernel, kernel], [s, s]) for p, s in zip(x, sigmas.tolist(), strict=True)]
    same(gaussian_blur(x, sigmas), torch.stack(expected))
    offsets = torch.arange(kernel) - kernel // 2
    weights = torch.exp(-0.5 * (offsets / sigmas.view(-1, 1)) ** 2)
    same(convolved(x, weights / weights.sum(dim=1, keepdim=True), offsets), torch.stack(expected))


def test_normalize_is_that_of_torchvision(pictures: Tensor) -> None:
    same(normalize(pictures), TF.normalize(pictures, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)),
        (40, 64, (0.2, 1.0), (3 / 4, 4 / 3)),
        (32, 32, (0.5, 1.0), (1 / 3, 3.0)),
        (30, 90, (0.7, 1.0), (3 / 4, 4 / 3)),
    ],
)
def test_boxes_are_distributed_as_those_of_torchvision(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator
) -> None:
    ours = random_boxes(20_000, height, width, scale, ratio, Randomness(generator)).double()
    picture = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(picture, list(scale), list(ratio)) for _ in range(4_000)], dtype=torch.float64
    )
    if (height, width) == (30, 90):  # nothing fits: torchvision centers what it falls back to, ours lies anywhere
        assert torch.equal(ours[:, 2:].unique(dim=0), theirs[:, 2:].unique(dim=0))
        return

    def moments(boxes: Tensor) -> Tensor:
        top, left, h, w = boxes.unbind(1)
        slack_y, slack_x = height - h, width - w
        each = [h, w, h * w, (w / h).log(), top, left, top - slack_y / 2, left - slack_x / 2, h * h, w * w]
        return torch.stack(each, dim=1)

    a, b = moments(ours), moments(theirs)
    error = (a.var(dim=0) / len(a) + b.var(dim=0) / len(b)).sqrt()
    assert ((a.mean(dim=0) - b.mean(dim=0)).abs() < 4 * error).all()


def test_boxes_lie_inside_and_keep_the_limits(generator: Generator) -> None:
    height, width = 48, 36
    top, left, h, w = random_boxes(20_000, height, width, (0.3, 0.6), (0.8, 1.25), Randomness(generator)).unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    assert (top + h == height).any()  # the last row and column can be reached
    assert (left + w == width).any()
    area, aspect = h * w / (height * width), w / h
    rounding = 0.5 / 20  # of sides of 20 pixels and more
    assert (area > 0.3 * (1 - 2 * rounding)).all()
    assert (area < 0.6 * (1 + 2 * rounding)).all()
    assert (aspect > 0.8 * (1 - 2 * rounding)).all()
    assert (aspect < 1.25 * (1 + 2 * rounding)).all()


@pytest.mark.parametrize(
    ("height", "width", "ratio", "fallback"),
    [(32, 32, (2.0, 3.0), (16, 32)), (32, 32, (0.25, 0.5), (32, 16)), (20, 200, (0.5, 2.0), (20, 40))],
)
def test_where_no_try_fits_the_picture_is_cut_to_the_nearest_aspect(
    height: int, width: int, ratio: tuple[float, float], fallback: tuple[int, int], generator: Generator
) -> None:
    boxes = random_boxes(50, height, width, (1.0, 1.0), ratio, Randomness(generator))
    assert boxes[:, 2:].unique(dim=0).tolist() == [list(fallback)]
    assert (boxes[:, 0] + boxes[:, 2] <= height).all()
    assert (boxes[:, 1] + boxes[:, 3] <= width).all()


def test_a_view_without_randomness_is_the_eval_view(random_pixels: Tensor, generator: Generator) -> None:
    same(augment(random_pixels, STILL, Randomness(generator)), eval_view(random_pixels))


@pytest.mark.parametrize(
    ("view", "p"),
    [
        (replace(STILL, flip=0.3), 0.3),
        (replace(STILL, gray=0.2), 0.2),
        (replace(STILL, solarize=0.4), 0.4),
        (replace(STILL, blur=0.6, blur_sigma=(0.5, 2.0)), 0.6),
        (replace(STILL, jitter=(0.0, 0.0, 0.0, 0.3), jitter_p=0.8), 0.8),
    ],
    ids=["flip", "gray", "solarize", "blur", "jitter"],
)
def test_each_augmentation_meets_its_share_of_the_images(view: View, p: float, generator: Generator) -> None:
    n = 3_000
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=generator).expand(n, -1, -1, -1)
    changed = ((augment(images, view, Randomness(generator)) - eval_view(images)).abs() > 1e-3).flatten(1).any(dim=1)
    assert abs(changed.double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / n)


FULL = View(16, (0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0, gray=0.2, blur=0.5, solarize=0.2)


def test_equal_pictures_get_different_views(random_pixels: Tensor, generator: Generator) -> None:
    views = augment(random_pixels[:1].expand(16, -1, -1, -1), FULL, Randomness(generator)).flatten(1)
    distance = torch.cdist(views, views) + torch.eye(16) * 1e9
    assert distance.min() > 0.1


def jittered(x: Tensor, strength: tuple[float, float, float, float], generator: Generator) -> Tensor:
    """With factors drawn for each of `x`."""
    return color_jitter(x, *jitter_factors(len(x), strength, Randomness(generator)))


@pytest.mark.parametrize("i", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_color_factors_are_drawn_for_each_image(i: int, pictures: Tensor, generator: Generator) -> None:
    strength = [0.0] * 4
    strength[i] = 0.3
    found = jittered(
        pictures[1:2].expand(32, -1, -1, -1), (strength[0], strength[1], strength[2], strength[3]), generator
    )
    assert found.flatten(1).unique(dim=0).shape[0] == 32


def test_brightness_factors_are_uniform_within_their_strength(generator: Generator) -> None:
    factor = jittered(torch.full((4_000, 3, 1, 1), 0.5), (0.4, 0.0, 0.0, 0.0), generator)[:, 0, 0, 0] / 0.5
    assert 0.6 <= factor.min() < 0.61
    assert 1.39 < factor.max() <= 1.4
    assert abs(factor.mean() - 1) < 4 * 0.8 / math.sqrt(12 * 4_000)
    assert abs(factor.std() - 0.8 / math.sqrt(12)) < 0.01


def test_hue_shifts_are_uniform_within_their_strength(generator: Generator) -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(4_000, -1, -1, -1)
    r, g, b = jittered(red, (0.0, 0.0, 0.0, 0.1), generator).flatten(1).unbind(1)
    same(r, torch.ones(4_000))
    shift = (g - b) / 6  # within a sixth of a turn green rises with a positive shift, blue with a negative
    assert -0.1 <= shift.min() < -0.098
    assert 0.098 < shift.max() <= 0.1
    assert abs(shift.mean()) < 4 * 0.2 / math.sqrt(12 * 4_000)


def test_the_order_of_the_color_operators_varies() -> None:
    x = torch.tensor([0.9, 0.2, 0.4]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    seen = {
        tuple(jittered(x, (0.0, 0.9, 0.9, 0.0), Generator().manual_seed(seed)).flatten().tolist()) for seed in range(3)
    }
    assert len(seen) == 3


def test_views_are_reproducible_by_the_generator(random_pixels: Tensor) -> None:
    first = augment(random_pixels, FULL, Randomness(Generator().manual_seed(1)))
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(first, augment(random_pixels, FULL, Randomness(Generator().manual_seed(1))))
    assert not torch.equal(first, augment(random_pixels, FULL, Randomness(Generator().manual_seed(2))))


def test_views_stay_in_range_and_finite(pictures: Tensor) -> None:
    images = (pictures * 255).round().to(torch.uint8).repeat(20, 1, 1, 1)
    strong = replace(FULL, jitter=(0.8, 0.8, 0.8, 0.2))
    x = augment(images, strong, Randomness(Generator().manual_seed(4)))
    assert x.shape == (120, 3, 16, 16)
    assert x.isfinite().all()
    low, high = normalize(torch.zeros(1, 3, 1, 1)), normalize(torch.ones(1, 3, 1, 1))
    assert (x >= low - 1e-5).all()
    assert (x <= high + 1e-5).all()


def test_pictures_need_not_have_the_size_of_the_view(generator: Generator) -> None:
    images = torch.randint(0, 256, (3, 3, 30, 50), dtype=torch.uint8, generator=generator)
    assert augment(images, FULL, Randomness(generator)).shape == (3, 3, 16, 16)
