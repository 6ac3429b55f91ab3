import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator
from torchvision.transforms import v2

from patchsight_serve.errors import BundleError
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_train.data import Images
from patchsight_train.teacher import BATCH, Teacher, to_pixels
from patchsight_train.views import eval_view, normalize

BUNDLE = Path(__file__).resolve().parents[3] / "model_repository" / "simclr-vit-cifar10"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(BUNDLE, CPU)


@pytest.mark.parametrize("recommended", ["cls", "mean"])
def test_embeds_as_the_server_does(recommended: str, photos: Images, tmp_path: Path) -> None:
    bundle = shutil.copytree(BUNDLE, tmp_path / BUNDLE.name)
    manifest = json.loads((bundle / "encoder.json").read_text())
    (bundle / "encoder.json").write_text(json.dumps(manifest | {"recommended": recommended}))
    pixels = photos.pixels[:20].permute(0, 2, 3, 1).contiguous().numpy()
    output = f"{recommended}_embedding"
    expected = OrtEncoder(BUNDLE, threads=1).run(pixels, [output])[output]
    found = Teacher(bundle, CPU)(eval_view(photos.pixels[:20]))
    assert found.dtype == torch.float32
    assert found.shape == (20, 128)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6, rtol=1e-6)


def test_an_image_alone_is_embedded_as_among_others(teacher: Teacher, photos: Images) -> None:
    views = eval_view(photos.pixels[: BATCH + 3])
    together = teacher(views)
    assert len(together) == BATCH + 3
    for i in (0, BATCH - 1, BATCH, BATCH + 2):
        torch.testing.assert_close(teacher(views[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)
    assert torch.equal(teacher(views), together)


def test_all_256_values_survive_the_way_there() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    assert torch.equal(to_pixels(eval_view(values), 16), values.permute(0, 2, 3, 1))


def test_half_precision_views_are_taken(teacher: Teacher, photos: Images) -> None:
    x = eval_view(photos.pixels[:4])
    torch.testing.assert_close(teacher(x.bfloat16()), teacher(x.bfloat16().float()))


@pytest.mark.parametrize(("S", "size"), [(48, 32), (20, 32), (33, 32), (224, 32)])
def test_views_of_another_size_are_resized_as_torchvision_does(S: int, size: int, generator: Generator) -> None:
    x = torch.rand(3, 3, S, S, generator=generator)
    expected = v2.functional.resize(x, [size, size], v2.InterpolationMode.BILINEAR, antialias=True)
    found = to_pixels(normalize(x), size)
    assert found.shape == (3, size, size, 3)
    torch.testing.assert_close(found.float(), (255 * expected).permute(0, 2, 3, 1), atol=0.51, rtol=0)


def test_values_beyond_white_and_black_are_cut() -> None:
    x = torch.stack([torch.full((3, 32, 32), 9.0), torch.full((3, 32, 32), -9.0)])
    pixels = to_pixels(x, 32)
    assert (pixels[0] == 255).all()
    assert (pixels[1] == 0).all()


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere: encoder.json is missing"):
        Teacher(tmp_path / "nowhere", CPU)
    bundle = shutil.copytree(BUNDLE, tmp_path / BUNDLE.name)
    with (bundle / "1" / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match="the file was changed"):
        Teacher(bundle, CPU)


def test_a_graph_that_onnx_runtime_cannot_load_is_named(tmp_path: Path) -> None:
    bundle = tmp_path / BUNDLE.name
    (bundle / "1").mkdir(parents=True)
    (bundle / "1" / "model.onnx").write_bytes(b"no graph")
    manifest = json.loads((BUNDLE / "encoder.json").read_text())
    sha256 = hashlib.sha256(b"no graph").hexdigest()
    (bundle / "encoder.json").write_text(json.dumps(manifest | {"sha256": sha256}))
    with pytest.raises(BundleError, match="ONNX Runtime cannot load"):
        Teacher(bundle, CPU)


def test_a_gpu_that_onnx_runtime_cannot_use_is_no_silent_cpu() -> None:
    cuda = torch.device("cuda")
    if torch.cuda.is_available():
        assert Teacher(BUNDLE, cuda).session.get_providers()[0] == "CUDAExecutionProvider"
        return
    with pytest.raises(BundleError, match="no usable CUDAExecutionProvider here; install patchsight"):
        Teacher(BUNDLE, cuda)
