"""The thresholding against DINO's definition, the colors against what they promise, the overlay pixel by pixel."""

import io

import numpy as np
import pytest
from PIL import Image

from patchsight_serve.decode import fit
from patchsight_serve.heatmap import COLORS, keep_mass, overlay, shown_crop
from patchsight_serve.manifest import Transform


def dino_mask(attention: np.ndarray, threshold: float) -> np.ndarray:
    """visualize_attention.py: sort ascending, keep what lies above 1 - threshold of the cumulated mass."""
    flat = attention.ravel().astype(np.float64)
    order = np.argsort(flat)
    cumulated = np.cumsum(flat[order] / flat.sum())
    mask = np.zeros(len(flat), bool)
    mask[order] = cumulated > 1 - threshold
    return mask.reshape(attention.shape)


@pytest.mark.parametrize("mass", [0.1, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("seed", range(5))
def test_kept_patches_are_those_of_dino(mass: float, seed: int) -> None:
    attention = np.random.default_rng(seed).exponential(size=(8, 6)).astype(np.float32)
    kept = keep_mass(attention, mass)
    np.testing.assert_array_equal(kept > 0, dino_mask(attention, mass))
    np.testing.assert_array_equal(kept[kept > 0], attention[kept > 0])


def test_kept_patches_are_the_fewest_that_reach_the_mass() -> None:
    attention = np.array([[0.4, 0.1], [0.2, 0.3]], np.float32)
    assert keep_mass(attention, 0.4).tolist() == np.array([[0.4, 0], [0, 0]], np.float32).tolist()
    assert keep_mass(attention, 0.41).astype(bool).tolist() == [[True, False], [False, True]]
    np.testing.assert_array_equal(keep_mass(attention, 1.0), attention)
    np.testing.assert_array_equal(keep_mass(np.zeros((2, 2), np.float32), 0.6), 0)


def test_lightness_rises_in_equal_steps() -> None:
    """CIE L*, which is not the space the colors were made in, from the sRGB bytes."""
    c = COLORS / 255.0
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    Y = linear @ [0.2126, 0.7152, 0.0722]
    L = np.where(Y > 0.008856, 116 * np.cbrt(Y) - 16, 903.3 * Y)
    steps = np.diff(L[::16])
    assert (steps > 0).all()
    assert steps.max() < 2.5 * steps.min()


def read(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_the_strongest_patch_is_brightest_and_the_weakest_darkest() -> None:
    attention = np.full((8, 8), 0.01, np.float32)
    attention[2, 5], attention[6, 1] = 0.02, 0.005
    shown = read(overlay(np.full((448, 448, 3), 120, np.uint8), attention)).astype(int).sum(axis=2)
    centers = shown[28::56, 28::56]
    assert np.unravel_index(centers.argmax(), (8, 8)) == (2, 5)
    assert np.unravel_index(centers.argmin(), (8, 8)) == (6, 1)


def test_cut_patches_are_gray_to_their_very_edge() -> None:
    attention = np.zeros((4, 4), np.float32)
    attention[1, 2] = 1
    colored = np.zeros((64, 64, 3), np.uint8) + np.array([200, 100, 0], np.uint8)
    shown = read(overlay(colored, attention, thresholded=True)).astype(int)
    gray = (shown[..., 0] == shown[..., 1]) & (shown[..., 1] == shown[..., 2])
    expected = np.ones((64, 64), bool)
    expected[16:32, 32:48] = False
    np.testing.assert_array_equal(gray, expected)


def test_a_map_without_differences_is_drawn() -> None:
    for value in (0.0, 0.01):
        assert read(overlay(np.zeros((448, 448, 3), np.uint8), np.full((8, 8), value, np.float32))).shape == (
            448,
            448,
            3,
        )


@pytest.mark.parametrize("grid", [1, 7, 8, 14, 37])
def test_the_shown_crop_is_a_multiple_of_the_grid_and_the_encoder_s_part(grid: int) -> None:
    y, x = np.mgrid[:600, :900]
    image = Image.fromarray(np.stack([x // 4, y // 3, x * 0], axis=2).astype(np.uint8))
    transform = Transform(resize=40, crop=32)
    shown = shown_crop(image, transform, grid)
    assert len(shown) % grid == 0
    assert len(shown) >= 384
    np.testing.assert_allclose(shown[[0, -1], [0, -1]], fit(image, transform)[[0, -1], [0, -1]], atol=5)
