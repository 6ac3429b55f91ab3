"""What every engine must do: the same tests for the fake, and for ONNX Runtime on the tiny bundle."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from patchsight_serve.encoder import Encoder
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.ort_encoder import OrtEncoder

ENGINES: dict[str, Callable[[Path], Encoder]] = {
    "fake": lambda _: FakeEncoder(),
    "onnxruntime": lambda bundle: OrtEncoder(bundle, threads=1),
}


@pytest.fixture(params=ENGINES)
def encoder(request: pytest.FixtureRequest, tiny_bundle: Path) -> Encoder:
    return ENGINES[request.param](tiny_bundle)


@pytest.fixture
def images(encoder: Encoder) -> np.ndarray:
    side = encoder.manifest.transform.crop
    return np.random.default_rng(0).integers(0, 256, (5, side, side, 3), np.uint8)


def test_outputs_are_as_the_manifest_says(encoder: Encoder, images: np.ndarray) -> None:
    values = encoder.run(images, list(encoder.manifest.outputs))
    assert {name: v.shape[1:] for name, v in values.items()} == encoder.manifest.outputs
    assert all(v.dtype == np.float32 and len(v) == 5 and np.isfinite(v).all() for v in values.values())


def test_only_what_was_asked_for(encoder: Encoder, images: np.ndarray) -> None:
    assert list(encoder.run(images, ["attention", "cls_embedding"])) == ["attention", "cls_embedding"]


def test_a_batch_of_one_equals_a_batch_of_five(encoder: Encoder, images: np.ndarray) -> None:
    names = list(encoder.manifest.outputs)
    together = encoder.run(images, names)
    for i in range(5):
        alone = encoder.run(images[i : i + 1], names)
        for name in names:
            np.testing.assert_allclose(alone[name][0], together[name][i], rtol=1e-5, atol=1e-5)


def test_attention_is_a_share_less_what_prefix_tokens_keep(encoder: Encoder, images: np.ndarray) -> None:
    attention = encoder.run(images, ["attention"])["attention"]
    assert (attention >= 0).all()
    np.testing.assert_allclose(attention.sum(axis=(2, 3)), 0.9, atol=1e-5)


def test_equal_images_are_equal_and_one_pixel_makes_a_difference(encoder: Encoder, images: np.ndarray) -> None:
    other = images[:1].copy()
    other[0, 3, 3, 1] ^= 1
    a, b, c = encoder.run(np.concatenate([images[:1], images[:1], other]), ["cls_embedding"])["cls_embedding"]
    assert (a == b).all()
    assert (a != c).any()
