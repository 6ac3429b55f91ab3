"""What every engine must do: the same tests for the fake, and for ONNX Runtime and OpenVINO on the tiny
bundles."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from patchsight_serve.encoder import Encoder, default_name
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.openvino_encoder import OpenvinoEncoder
from patchsight_serve.ort_encoder import OrtEncoder

VITS: dict[str, Callable[[Path], Encoder]] = {
    "fake": lambda _: FakeEncoder(),
    "onnxruntime": lambda bundle: OrtEncoder(bundle, threads=1),
    "openvino": lambda bundle: OpenvinoEncoder(bundle, threads=1),
}
RESNETS: dict[str, Callable[[Path], Encoder]] = {
    "fake ResNet": lambda _: FakeEncoder(patch_size=None),
    "ResNet on onnxruntime": lambda bundle: OrtEncoder(bundle, threads=1),
    "ResNet on openvino": lambda bundle: OpenvinoEncoder(bundle, threads=1),
}


@pytest.fixture(params=VITS)
def vit(request: pytest.FixtureRequest, tiny_bundle: Path) -> Encoder:
    return VITS[request.param](tiny_bundle)


@pytest.fixture(params=RESNETS)
def resnet(request: pytest.FixtureRequest, mean_bundle: Path) -> Encoder:
    return RESNETS[request.param](mean_bundle)


@pytest.fixture(params=[*VITS, *RESNETS])
def encoder(request: pytest.FixtureRequest, tiny_bundle: Path, mean_bundle: Path) -> Encoder:
    name = request.param
    return VITS[name](tiny_bundle) if name in VITS else RESNETS[name](mean_bundle)


def images(encoder: Encoder) -> np.ndarray:
    side = encoder.manifest.transform.crop
    return np.random.default_rng(0).integers(0, 256, (5, side, side, 3), np.uint8)


def test_outputs_are_as_the_manifest_says(encoder: Encoder) -> None:
    values = encoder.run(images(encoder), list(encoder.manifest.outputs))
    assert {name: v.shape[1:] for name, v in values.items()} == encoder.manifest.outputs
    assert all(v.dtype == np.float32 and len(v) == 5 and np.isfinite(v).all() for v in values.values())


def test_a_resnet_has_its_mean_alone(resnet: Encoder) -> None:
    assert resnet.manifest.outputs.keys() == {"mean_embedding"}
    assert resnet.manifest.recommended == "mean"


def test_only_what_was_asked_for(vit: Encoder) -> None:
    assert list(vit.run(images(vit), ["attention", "cls_embedding"])) == ["attention", "cls_embedding"]


def test_a_batch_of_one_equals_a_batch_of_five(encoder: Encoder) -> None:
    names, pixels = list(encoder.manifest.outputs), images(encoder)
    together = encoder.run(pixels, names)
    for i in range(5):
        alone = encoder.run(pixels[i : i + 1], names)
        for name in names:
            np.testing.assert_allclose(alone[name][0], together[name][i], rtol=1e-5, atol=1e-5)


def test_attention_is_a_share_less_what_prefix_tokens_keep(vit: Encoder) -> None:
    attention = vit.run(images(vit), ["attention"])["attention"]
    assert (attention >= 0).all()
    np.testing.assert_allclose(attention.sum(axis=(2, 3)), 0.9, atol=1e-5)


def test_equal_images_are_equal_and_one_pixel_makes_a_difference(encoder: Encoder) -> None:
    name = f"{encoder.manifest.recommended}_embedding"
    image = images(encoder)[:1]
    other = image.copy()
    other[0, 3, 3, 1] ^= 1
    a, b, c = encoder.run(np.concatenate([image, image, other]), [name])[name]
    assert (a == b).all()
    assert (a != c).any()


def test_the_encoder_that_sees_the_largest_pictures_is_the_default() -> None:
    sizes = {"a": 16, "b": 32, "c": 32, "d": 8}
    encoders: dict[str, Encoder] = {name: FakeEncoder(name, image_size=size) for name, size in sizes.items()}
    assert default_name(encoders) == "b"
    assert default_name({"d": encoders["d"]}) == "d"


def test_of_encoders_that_see_pictures_of_one_size_the_default_has_the_most_parameters() -> None:
    encoders: dict[str, Encoder] = {}
    for name, parameters in {"a": 5, "b": 9, "c": 9}.items():
        fake = FakeEncoder(name, image_size=32)
        fake.manifest = fake.manifest.model_copy(update={"parameters": parameters})
        encoders[name] = fake
    assert default_name(encoders) == "b"
