from pathlib import Path

import numpy as np
import torch
from torch import Generator

from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_train.architecture import ResNetConfig, ViTConfig
from patchsight_train.initial import read_encoder
from patchsight_train.judge.features import features
from patchsight_train.onnx_weights import read_whitening
from patchsight_train.resnet import ResNet
from patchsight_train.views import eval_view
from patchsight_train.vit import ViT

PIXELS = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=Generator().manual_seed(0))


def vit(depth: int) -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig(image_size=16, patch_size=4, width=16, depth=depth, heads=2, registers=1)).eval()


def test_the_kinds_are_the_encoders_own_embeddings_and_its_last_blocks_by_hand() -> None:
    encoder = vit(5)
    found = features(encoder, PIXELS, {})
    x = eval_view(PIXELS)
    with torch.no_grad():
        for kind in ("cls", "mean"):
            torch.testing.assert_close(found[kind], encoder.pooled(x, kind))
        expected = []
        for stop in (2, 3, 4, 5):  # an encoder that ends after so many blocks
            shorter = vit(5)
            shorter.blocks = shorter.blocks[:stop]
            expected.append(shorter(x)[:, 0])
    torch.testing.assert_close(found["last 4 blocks"], torch.cat(expected, dim=1))


def test_a_shallow_encoder_gives_the_blocks_it_has_and_a_resnet_its_mean() -> None:
    assert features(vit(2), PIXELS, {})["last 2 blocks"].shape == (5, 32)
    resnet = ResNet(ResNetConfig(image_size=16, depth=18)).eval()
    assert list(features(resnet, PIXELS, {})) == ["mean"]


def test_one_image_alone_is_embedded_as_among_others() -> None:
    encoder = vit(3)
    together = features(encoder, PIXELS, {})
    for kind, z in together.items():
        torch.testing.assert_close(features(encoder, PIXELS[2:3], {})[kind], z[2:3], atol=1e-5, rtol=1e-5)


def test_of_a_bundle_that_whitens_they_are_what_it_serves() -> None:
    """ONNX Runtime against torch with the weights and the whitening that were read back from the graph."""
    bundle = Path(__file__).resolve().parents[4] / "model_repository" / "simclr-vit-photos"
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    whitening = read_whitening(bundle / "1" / "model.onnx")
    assert whitening.keys() == {"cls", "mean", "both"}
    found = features(read_encoder(bundle)[0], torch.from_numpy(images).permute(0, 3, 1, 2), whitening)
    served = OrtEncoder(bundle, threads=1).run(images, [f"{kind}_embedding" for kind in whitening])
    for kind in whitening:
        wanted = served[f"{kind}_embedding"]
        np.testing.assert_allclose(found[kind], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert found["last 4 blocks"].shape == (3, 4 * 128)


def test_a_bundle_that_does_not_whiten_has_no_whitening() -> None:
    bundle = Path(__file__).resolve().parents[4] / "model_repository" / "simclr-vit-cifar10"
    assert read_whitening(bundle / "1" / "model.onnx") == {}
