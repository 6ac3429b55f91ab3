"""OpenVINO against ONNX Runtime on the tiny bundles, and what must be refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from measure import ROOT

from patchsight_serve import openvino_encoder
from patchsight_serve.errors import BundleError
from patchsight_serve.openvino_encoder import OpenvinoEncoder
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.trial_pictures import noise, photos

HAS_BF16 = "BF16" in openvino_encoder.capabilities(openvino.Core())


@pytest.fixture
def any_size(make_bundle: Callable[..., Path], tmp_path: Path, rewrite: Callable[..., Path]) -> Path:
    """A mean of cells, of pictures of any size."""

    def open_axes(model: onnx.ModelProto) -> None:
        dims = model.graph.input[0].type.tensor_type.shape.dim
        dims[1].dim_param, dims[2].dim_param = "H", "W"

    bundle = make_bundle(
        tmp_path / "any", patch_size=None, num_heads=None, prefix_tokens=0, recommended="mean", dynamic_size=True
    )
    return rewrite(bundle, open_axes)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("threads", [1, None])
def test_every_output_is_that_of_onnx_runtime(tiny_bundle: Path, threads: int | None) -> None:
    reference, encoder = OrtEncoder(tiny_bundle, 1), OpenvinoEncoder(tiny_bundle, threads)
    for batch in (1, 3, 8, 1):  # smaller again: memory of the larger batch must not be read
        images = noise(16, batch)
        for names in (list(encoder.manifest.outputs), ["attention"], ["patch_tokens", "cls_embedding"]):
            assert_same(encoder.run(images, names), reference.run(images, names))


def test_pictures_of_any_size(any_size: Path) -> None:
    reference, encoder = OrtEncoder(any_size, 1), OpenvinoEncoder(any_size, 1)
    for height, width, batch in ((32, 32, 1), (48, 36, 3), (16, 64, 2), (32, 32, 5)):
        images = noise(height, batch, width)
        assert_same(encoder.run(images, ["mean_embedding"]), reference.run(images, ["mean_embedding"]))


def test_results_outlive_the_next_run(tiny_bundle: Path) -> None:
    encoder, images = OpenvinoEncoder(tiny_bundle, 1), noise(16, 2)
    first = encoder.run(images, ["patch_tokens"])["patch_tokens"]
    kept = first.copy()
    encoder.run(255 - images, ["patch_tokens"])
    np.testing.assert_array_equal(first, kept)


def test_rows_of_a_larger_array_are_read_as_they_stand(tiny_bundle: Path) -> None:
    """Not every array is contiguous, and OpenVINO takes the memory as it is."""
    encoder, images = OpenvinoEncoder(tiny_bundle, 1), noise(16, 6)
    found = encoder.run(images[::2], ["cls_embedding"])
    assert_same(found, encoder.run(np.ascontiguousarray(images[::2]), ["cls_embedding"]))


def test_fp32_is_what_it_computes_in_unless_asked(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself OpenVINO takes bf16 where the processor has it; where it has AVX512 alone, that emulates it."""
    images = noise(16, 4)
    expected = OrtEncoder(tiny_bundle, 1).run(images, ["patch_tokens"])["patch_tokens"]
    monkeypatch.setattr(openvino_encoder, "capabilities", lambda _: ["FP32", "BF16"])
    errors = {}
    for precision in ("fp32", "bf16"):
        encoder = OpenvinoEncoder(tiny_bundle, 1, precision)  # type: ignore[arg-type]
        assert (encoder.runtime.engine, encoder.runtime.precision) == ("openvino", precision)
        errors[precision] = np.abs(encoder.run(images, ["patch_tokens"])["patch_tokens"] - expected).max()
    assert errors["fp32"] < 1e-6 * np.abs(expected).max()
    assert errors["bf16"] < 2e-2 * np.abs(expected).max()
    if "avx512" in Path("/proc/cpuinfo").read_text():
        assert errors["bf16"] > 1e-4 * np.abs(expected).max()


@pytest.fixture
def whitened(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that whitens, on a processor that says it has bf16: OpenVINO emulates it where it has not."""
    monkeypatch.setattr(openvino_encoder, "capabilities", lambda _: ["FP32", "BF16"])
    return ROOT / "model_repository" / "dino-vit-cifar10"


def test_bf16_whitens_in_fp32(whitened: Path) -> None:
    """The embedding is, to fp32's last digits, what whitening makes of the patch tokens that came with it."""
    weights = {
        w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(whitened / "1" / "model.onnx").graph.initializer
    }
    encoder = OpenvinoEncoder(whitened, 1, "bf16")
    found = encoder.run(photos(encoder.manifest.transform), ["patch_tokens", "mean_embedding"])
    tokens = found["patch_tokens"]
    mean = tokens.reshape(len(tokens), -1, tokens.shape[-1]).mean(axis=1)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    expected = (unit - weights["mean.mean"]) @ weights["mean.W"]
    np.testing.assert_allclose(found["mean_embedding"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_an_image_alone_has_the_embedding_that_it_has_among_others_in_bf16(whitened: Path) -> None:
    """From 16 rows on, OpenVINO's products of matrices are other kernels' on processors with AMX. To the last bit where
    there is bf16; what emulates it does not round alike at every size."""
    encoder = OpenvinoEncoder(whitened, 1, "bf16")
    images = photos(encoder.manifest.transform, 24)
    names = ["cls_embedding", "mean_embedding", "both_embedding"]
    alone = [encoder.run(images[i : i + 1], names) for i in range(len(images))]
    together = encoder.run(images, names)
    for name in names:
        a, b = np.concatenate([one[name] for one in alone]), together[name]
        if HAS_BF16:
            np.testing.assert_array_equal(a, b, err_msg=name)
        cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        assert cosines.min() > 0.9999, name


def test_bf16_where_the_processor_has_none_is_refused(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_encoder, "capabilities", lambda _: ["FP32", "INT8"])
    with pytest.raises(BundleError, match="tiny: this processor computes nothing in bf16.*--inference-precision"):
        OpenvinoEncoder(tiny_bundle, 1, "bf16")


def test_without_the_extra_the_error_names_it(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BundleError, match=r"pip install 'patchsight\[openvino\]'"):
        OpenvinoEncoder(tiny_bundle)


def test_a_graph_that_says_something_else_is_refused(
    make_bundle: Callable[..., Path], tmp_path: Path, rewrite: Callable[..., Path]
) -> None:
    bundle = make_bundle(tmp_path / "tiny")
    told = json.loads((bundle / "encoder.json").read_text())
    (bundle / "encoder.json").write_text(json.dumps(told | {"license": "mine"}))
    with pytest.raises(BundleError, match="license = 'mine', the ONNX file says 'CC0-1.0'"):
        OpenvinoEncoder(bundle)
    with pytest.raises(BundleError, match="no metadata 'patchsight'"):
        OpenvinoEncoder(rewrite(make_bundle(tmp_path / "mute"), lambda model: model.ClearField("metadata_props")))


def test_a_graph_of_another_shape_is_refused(
    make_bundle: Callable[..., Path], tmp_path: Path, rewrite: Callable[..., Path]
) -> None:
    def drop(model: onnx.ModelProto) -> None:
        del model.graph.output[2]

    with pytest.raises(BundleError, match="output 'attention' is None"):
        OpenvinoEncoder(rewrite(make_bundle(tmp_path / "short"), drop))
    with pytest.raises(BundleError, match=r"image: uint8 \[\?, 16, 16, 3\], not image: uint8 \[N, 32, 32, 3\]"):
        OpenvinoEncoder(make_bundle(tmp_path / "small", transform={"resize": 32, "crop": 32}))


def test_a_graph_that_openvino_cannot_read_is_refused(
    make_bundle: Callable[..., Path], tmp_path: Path, rewrite: Callable[..., Path]
) -> None:
    def strange(model: onnx.ModelProto) -> None:
        model.graph.node[1].op_type, model.graph.node[1].domain = "Unheard", "of.nobody"
        model.opset_import.append(onnx.helper.make_opsetid("of.nobody", 1))

    with pytest.raises(BundleError, match="strange: OpenVINO cannot load"):
        OpenvinoEncoder(rewrite(make_bundle(tmp_path / "strange"), strange))


SIGNALS = """
import gc, signal, sys
from pathlib import Path
from patchsight_serve.openvino_encoder import OpenvinoEncoder

signal.signal(signal.SIGINT, lambda *_: print("heard"))
one, other = (OpenvinoEncoder(Path(sys.argv[1]), 1) for _ in range(2))
signal.raise_signal(signal.SIGINT)
for name in ("one", "other"):
    del globals()[name]
    gc.collect()
    signal.raise_signal(signal.SIGINT)
"""


def test_signals_are_heard_while_encoders_come_and_go(tiny_bundle: Path) -> None:
    """OpenVINO gives the thread that loads a graph another stack for signals, and at the graph's end the one of before,
    which by then may be that of a graph that is gone: the next signal would be the end of the process."""
    done = subprocess.run([sys.executable, "-c", SIGNALS, tiny_bundle], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, 3 * "heard\n"), done.stderr
