"""Each perturbation against Pillow or torchvision, on the photos that ship."""

import io
from itertools import groupby

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as oracle

from patchsight_train.color import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation
from patchsight_train.data import Images
from patchsight_train.judge.perturbations import (
    PERTURBATIONS,
    Harm,
    Perturbation,
    blur,
    color,
    crop,
    jpeg,
    noise,
    scale,
)

NAMES = [f"{p.name}-{p.strength:g}" for p in PERTURBATIONS]
IDENTITIES = [
    scale(1), crop(1), noise(0), blur(0), color(adjust_brightness, 1), color(adjust_contrast, 1),
    color(adjust_saturation, 1), color(adjust_hue, 0),
]  # fmt: skip


@pytest.fixture(scope="module")
def pixels(photos: Images) -> Tensor:
    """uint8 `(20, 3, 32, 32)`."""
    return photos.pixels[::10]


def images(pixels: Tensor) -> list[Image.Image]:
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]


def apply(harm: Harm, pixels: Tensor) -> Tensor:
    return harm(pixels, Generator().manual_seed(0))


def assert_alike(found: Tensor, expected: list[Image.Image], most: int) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs, dtype=int))
        assert difference.max() <= most


@pytest.mark.parametrize("quality", [90, 50, 20, 10])
def test_jpeg_is_pillows(quality: int, pixels: Tensor) -> None:
    def saved(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    assert_alike(apply(jpeg(quality), pixels), [saved(image) for image in images(pixels)], most=0)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_scale_is_pillows(share: float, pixels: Tensor) -> None:
    side = round(32 * share)
    expected = [
        image.resize((side, side), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC)
        for image in images(pixels)
    ]
    assert_alike(apply(scale(share), pixels), expected, most=2)  # torch's weights are rounded elsewhere


@pytest.mark.parametrize("share", [0.9, 0.75, 0.5])
def test_crop_is_pillows(share: float, pixels: Tensor) -> None:
    side = round(32 * share)
    start = (32 - side) // 2
    box = (start, start, start + side, start + side)
    expected = [image.crop(box).resize((32, 32), Image.Resampling.BICUBIC) for image in images(pixels)]
    assert_alike(apply(crop(share), pixels), expected, most=2)


@pytest.mark.parametrize("sigma", [0.5, 1, 2])
@pytest.mark.parametrize("S", [32, 48])
def test_blur_is_torchvisions(sigma: float, S: int, pixels: Tensor) -> None:
    larger = torch.nn.functional.interpolate(pixels, size=(S, S), mode="nearest")
    own = sigma * S / 32
    kernel = 2 * int(np.ceil(3 * own)) + 1
    expected = (255 * oracle.gaussian_blur(larger / 255, [kernel, kernel], [own, own])).round()
    assert (apply(blur(sigma), larger) - expected).abs().max() <= 1


def test_colors_are_torchvisions(pixels: Tensor) -> None:
    def named(name: str, x: Tensor, s: float) -> Tensor:
        if name == "gray":
            return oracle.rgb_to_grayscale(x, 3)
        return getattr(oracle, f"adjust_{name}")(x, s if name == "hue" else 1 - s)

    for p in PERTURBATIONS:
        if p.name in ("brightness", "contrast", "saturation", "hue", "gray"):
            expected = 255 * named(p.name, pixels / 255, p.strength)
            assert (apply(p.apply, pixels) - expected).abs().max() <= 1, p.name


def test_flip_and_rotation_are_pillows(pixels: Tensor) -> None:
    by_name = {p.name: p.apply for p in PERTURBATIONS}
    assert_alike(apply(by_name["flip"], pixels), [ImageOps.mirror(image) for image in images(pixels)], most=0)
    assert_alike(apply(by_name["rotation"], pixels), [image.rotate(90) for image in images(pixels)], most=0)


def test_noise_has_its_deviation() -> None:
    gray = torch.full((50, 3, 32, 32), 128, dtype=torch.uint8)
    for sigma in (5, 15, 30):
        found = apply(noise(sigma), gray).double()
        assert found.mean() == pytest.approx(128, abs=0.3)
        assert found.std() == pytest.approx(sigma, rel=0.02)
    assert torch.equal(apply(noise(15), gray), apply(noise(15), gray))
    assert not torch.equal(noise(15)(gray, Generator().manual_seed(1)), apply(noise(15), gray))


def test_pillows_blur_is_near(pixels: Tensor) -> None:
    """Pillow approximates by boxes and repeats the edge: inside, the same picture."""
    found = apply(blur(2), pixels)[:, :, 8:-8, 8:-8]
    expected = [image.filter(ImageFilter.GaussianBlur(2)).crop((8, 8, 24, 24)) for image in images(pixels)]
    assert_alike(found, expected, most=8)


@pytest.mark.parametrize("harm", IDENTITIES)
def test_no_strength_is_no_harm(harm: Harm, pixels: Tensor) -> None:
    assert torch.equal(apply(harm, pixels), pixels)


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=NAMES)
@pytest.mark.parametrize("S", [8, 32, 45])
def test_shape_stays_and_the_picture_changes(perturbation: Perturbation, S: int, pixels: Tensor) -> None:
    before = torch.nn.functional.interpolate(pixels, size=(S, S), mode="bilinear")
    kept = before.clone()
    found = apply(perturbation.apply, before)
    assert found.dtype == torch.uint8
    assert found.shape == before.shape
    assert torch.equal(before, kept)
    assert torch.equal(found, before) == (S == 8 and perturbation.name == "blur" and perturbation.strength < 2)


@pytest.mark.parametrize("perturbation", [p for p in PERTURBATIONS if p.name != "noise"], ids=lambda p: p.name)
def test_one_picture_or_many(perturbation: Perturbation, pixels: Tensor) -> None:
    alone = torch.cat([apply(perturbation.apply, picture[None]) for picture in pixels[:4]])
    assert torch.equal(alone, apply(perturbation.apply, pixels)[:4])


@pytest.mark.parametrize("name", [name for name, _ in groupby(PERTURBATIONS, key=lambda p: p.name)])
def test_stronger_is_further_from_the_picture(name: str, pixels: Tensor) -> None:
    moved = [(apply(p.apply, pixels).double() - pixels).square().mean().item() for p in PERTURBATIONS if p.name == name]
    assert moved == sorted(moved)
    assert moved[0] > 0
