"""The graph: what it computes, how it is built, and that it is the same wherever it is made."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torchvision
from torchvision.transforms.v2 import functional as tv

import patchsight_export
import patchsight_serve
import patchsight_train
from patchsight_export.source import Source, read_run
from patchsight_export.to_onnx import served, strip, to_onnx, with_metadata
from patchsight_export.verify import verify
from patchsight_serve.manifest import load_manifest
from patchsight_serve.trial_pictures import noise
from patchsight_train.architecture import ResNetConfig
from patchsight_train.resnet import ResNet


@pytest.fixture(scope="module")
def source(run: Path) -> Source:
    return read_run(run)


@pytest.fixture(scope="module")
def model(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "1" / "model.onnx")


def normalized(images: np.ndarray) -> torch.Tensor:
    """By torchvision."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
    return tv.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def reference(source: Source, images: np.ndarray) -> dict[str, np.ndarray]:
    """The four outputs by torchvision's normalization, the encoder's own SDPA path, and attention from the last
    block's queries and keys in float64."""
    vit, P = source.encoder, source.encoder.config.prefix_tokens
    x = normalized(images)
    inputs: list[torch.Tensor] = []
    last = vit.blocks[-1].attn
    hook = last.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        tokens = vit(x)
        q, k, _ = last.heads_of(inputs[0])
    hook.remove()
    logits = torch.einsum("nhqd,nhkd->nhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    weights = logits.softmax(-1)[:, :, 0]
    N, g = len(images), vit.config.grid
    return {
        "cls_embedding": tokens[:, 0].numpy(),
        "mean_embedding": tokens[:, P:].mean(1).numpy(),
        "attention": np.stack([[weights[n, h, P:].reshape(g, g).numpy() for h in range(2)] for n in range(N)]),
        "patch_tokens": np.stack([tokens[n, P:].reshape(g, g, -1).numpy() for n in range(N)]),
    }


@pytest.mark.parametrize("batch", [1, 3, 8, 13])
def test_outputs_against_an_independent_reference(bundle: Path, source: Source, batch: int) -> None:
    images = noise(16, batch)
    wanted = reference(source, images)
    session = ort.InferenceSession((bundle / "1" / "model.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    found = dict(zip(wanted, session.run(list(wanted), {"image": images}), strict=True))
    for name, value in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)
    total = found["attention"].sum((2, 3))
    assert (total < 1).all()
    assert total.min() < 0.95  # the prefix tokens take their share
    assert np.abs(found["attention"][:, 0] - found["attention"][:, 1]).max() > 0.01  # heads differ


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_attention_is_one_node_in_all_blocks_but_the_last(model: onnx.ModelProto) -> None:
    assert model.opset_import[0].version == 23
    assert operators(model)["Attention"] == 2  # of 3 blocks
    assert operators(model)["Softmax"] == 1


def test_opset_18(source: Source) -> None:
    old = to_onnx(served(source.encoder), 16, opset=18)
    assert old.opset_import[0].version == 18
    assert operators(old)["Attention"] == 0
    assert operators(old)["Softmax"] == 3
    session = ort.InferenceSession(old.SerializeToString(), providers=["CPUExecutionProvider"])
    images = noise(16, 3)
    for (name, wanted), found in zip(
        reference(source, images).items(), session.run(None, {"image": images}), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("batch", [1, 3, 8, 13])
def test_a_resnet_against_torchvision(resnet_bundle: Path, resnet_run: Path, batch: int) -> None:
    """torchvision's own network with the run's weights, its pooling and its normalization."""
    theirs = torchvision.models.resnet18()
    theirs.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    theirs.maxpool, theirs.fc = torch.nn.Identity(), torch.nn.Identity()
    theirs.load_state_dict(read_run(resnet_run).encoder.state_dict())
    images = noise(16, batch)
    with torch.no_grad():
        wanted = theirs.eval()(normalized(images)).numpy()
    session = ort.InferenceSession((resnet_bundle / "1" / "model.onnx").read_bytes())
    (found,) = session.run(None, {"image": images})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert wanted.std() > 0.01


def test_a_resnet_s_norms_are_joined_with_its_convolutions(resnet_bundle: Path) -> None:
    found = operators(onnx.load(resnet_bundle / "1" / "model.onnx"))
    assert (found["Conv"], found["BatchNormalization"]) == (20, 0)


def test_resnet_50_for_photos() -> None:
    """As it is initialized, in evaluation."""
    torch.manual_seed(0)
    module = served(ResNet(ResNetConfig(40, 50, "imagenet")).eval())
    model = to_onnx(module, 40, ("mean_embedding",))
    verify(model.SerializeToString(), module, {"mean_embedding": (2048,)}, {"noise": noise(40)})


def shape(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize(
    ("made", "outputs"),
    [
        ("bundle", {"cls_embedding": [24], "mean_embedding": [24], "attention": [2, 4, 4], "patch_tokens": [4, 4, 24]}),
        ("resnet_bundle", {"mean_embedding": [512]}),
    ],
)
def test_signature(made: str, outputs: dict[str, list[int]], request: pytest.FixtureRequest) -> None:
    model = onnx.load(request.getfixturevalue(made) / "1" / "model.onnx")
    (image,) = model.graph.input
    assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    assert shape(image) == ["batch", 16, 16, 3]
    assert {o.name: shape(o) for o in model.graph.output} == {name: ["batch", *own] for name, own in outputs.items()}
    assert not [i.name for i in model.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]


def test_a_lone_file_explains_itself(bundle: Path, model: onnx.ModelProto) -> None:
    (entry,) = model.metadata_props
    assert (entry.key, entry.value) == ("patchsight", load_manifest(bundle).metadata())


def test_two_folders_give_identical_bytes(bundle: Path, run: Path, tmp_path: Path) -> None:
    """The packages copied elsewhere, in a process that stands elsewhere."""
    for package in (patchsight_train, patchsight_export, patchsight_serve):
        folder = Path(package.__path__[0])
        shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    target = tmp_path / "other" / "tiny"
    script = (
        "import sys, patchsight_export.__main__ as command, patchsight_train.vit as vit\n"
        "assert all(module.__file__.startswith(sys.argv[1]) for module in (command, vit))\n"
        "command.main(sys.argv[2:])"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "elsewhere"), str(run), str(target)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "elsewhere"), "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
    )
    assert (target / "1" / "model.onnx").read_bytes() == (bundle / "1" / "model.onnx").read_bytes()
    assert (target / "encoder.json").read_bytes() == (bundle / "encoder.json").read_bytes()


@pytest.mark.parametrize(("made", "of"), [("bundle", "run"), ("resnet_bundle", "resnet_run")])
def test_nothing_of_this_machine_is_inside(made: str, of: str, request: pytest.FixtureRequest) -> None:
    bundle, run = request.getfixturevalue(made), request.getfixturevalue(of)
    for path in bundle.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for trace in (b".py", b"File ", b"site-packages", str(run).encode(), str(Path.home()).encode() + b"/"):
            assert trace not in content, (path.name, trace)
        assert os.fsencode(Path(patchsight_export.__path__[0]).parent) not in content


def test_strip_reaches_subgraphs_and_functions() -> None:
    note = onnx.StringStringEntryProto(key="pkg.torch.onnx.stack_trace", value='File "/home/somebody/vit.py"')

    def node(**attributes: onnx.GraphProto) -> onnx.NodeProto:
        made = onnx.helper.make_node("If", ["c"], ["y"], doc_string=note.value, **attributes)
        made.metadata_props.append(note)
        return made

    inner = onnx.helper.make_graph([node()], "inner", [], [], doc_string=note.value)
    inner.metadata_props.append(note)
    graph = onnx.helper.make_graph([node(then_branch=inner, else_branch=inner)], "outer", [], [])
    function = onnx.helper.make_function("local", "f", [], [], [node(then_branch=inner)], [])
    function.metadata_props.append(note)
    model = onnx.helper.make_model(graph, functions=[function], doc_string=note.value)
    model.metadata_props.append(note)
    model.graph.value_info.add(name="v").metadata_props.append(note)
    assert b"somebody" in model.SerializeToString()
    strip(model)
    assert b"somebody" not in model.SerializeToString()


def test_metadata_replaces_what_was_there(model: onnx.ModelProto) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    again = onnx.load_from_string(with_metadata(copy, "new"))
    assert [(e.key, e.value) for e in again.metadata_props] == [("patchsight", "new")]
