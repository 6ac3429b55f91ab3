"""First weights from another run, or from a bundle that the real export made of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn

from patchsight_export import verify
from patchsight_export.__main__ import main as export
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import load_manifest, sha256_of
from patchsight_train import checkpoint
from patchsight_train.architecture import ResNetConfig, ViTConfig
from patchsight_train.build import OBJECTIVES, build, build_encoder
from patchsight_train.initial import KEPT, architecture_of, initialize, read_encoder, transfer
from patchsight_train.objective import Objective
from patchsight_train.objective_settings import SETTINGS
from patchsight_train.optimizer import adamw
from patchsight_train.resnet import ResNet
from patchsight_train.run import config_of, open_run
from patchsight_train.views import eval_view
from patchsight_train.vit import ViT

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "model_repository" / "simclr-vit-cifar10"
# Two heads, registers, another mlp_ratio than usual: nothing that a wrong order or axis could hide behind.
ODD: dict[str, Any] = {"width": 24, "depth": 3, "heads": 2, "registers": 2, "mlp_ratio": 2.0}
TINY: dict[str, Any] = {"image_size": 16, "patch_size": 4, "batch_size": 8, "device": "cpu"}


def scramble(module: nn.Module) -> None:
    """Every number far from its start and from every other, batch norm's statistics included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.add_(torch.rand_like(value), alpha=0.3)


def write_run(folder: Path, settings: Any) -> Objective:
    """A run folder as training leaves it, and the objective in its checkpoint."""
    objective = build(settings)
    scramble(objective)
    open_run(folder, config_of(settings))
    checkpoint.save(folder, 7, objective, adamw(objective, settings))
    return objective.eval()


def chosen(objective: str = "simclr", **changes: Any) -> Any:
    return SETTINGS[objective](**{"data": ["unread"], "dataset": "noise", "threads": 1} | TINY | ODD | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading only."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    write_run(folder, chosen())
    return folder


@pytest.fixture(scope="module")
def published(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For reading only."""
    folder = tmp_path_factory.mktemp("model_repository") / "tiny"
    export([str(run), str(folder)])
    return folder


@pytest.fixture
def bundle(published: Path, tmp_path: Path) -> Path:
    """A copy, for changing."""
    return Path(shutil.copytree(published, tmp_path / "tiny"))


def pictures(size: int) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def tokens(encoder: nn.Module, size: int) -> Tensor:
    with torch.no_grad():
        out: Tensor = encoder.eval()(pictures(size))
    return out


def close(found: Tensor, wanted: Tensor, limit: float = 1e-6) -> bool:
    return float((found - wanted).abs().max() / wanted.abs().max()) <= limit


def test_the_kept_encoder_of_each_objective() -> None:
    assert [objective.__name__.lower() for objective in OBJECTIVES] == [name.replace("_", "") for name in SETTINGS]
    assert KEPT["dino"] == "teacher"
    assert KEPT["mae"] == "encoder"


@pytest.mark.parametrize("objective", ["simclr", "dino", "mae"])
def test_from_a_run(objective: str, tmp_path: Path) -> None:
    source = write_run(tmp_path, chosen(objective))
    found, where = read_encoder(tmp_path)
    assert torch.equal(tokens(found, 16), tokens(source.kept, 16))
    assert "step 7" in where
    target = build(chosen("simclr", seed=5))
    lines = initialize(target, tmp_path)
    assert torch.equal(tokens(target.kept, 16), tokens(source.kept, 16))
    assert len(lines) == 1


def test_both_encoders_of_dino_begin_alike(run: Path) -> None:
    target = build(chosen("dino"))
    initialize(target, run)
    source, _ = read_encoder(run)
    student = target.get_submodule("student")
    assert torch.equal(tokens(student, 16), tokens(source, 16))
    assert torch.equal(tokens(target.kept, 16), tokens(source, 16))
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in target.kept.parameters())


def test_from_a_bundle(run: Path, published: Path) -> None:
    target = build(chosen("simclr", seed=5))
    initialize(target, published)
    source, _ = read_encoder(run)
    assert close(tokens(target.kept, 16), tokens(source, 16))
    wanted = source.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in target.kept.state_dict().items())
    assert architecture_of(published) == architecture_of(run) == source.config


def test_a_bundle_whose_embeddings_are_whitened_has_the_same_weights(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "LIMIT", 1e-2)  # pictures are nearly all one to random weights: rounding is magnified
    rng = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "noise" / f"{i}.png")
    export([str(run), str(tmp_path / "white"), "--whiten", str(tmp_path / "noise")])
    wanted, found = (read_encoder(source)[0].state_dict() for source in (run, tmp_path / "white"))
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


def test_a_graph_of_an_older_opset(run: Path, tmp_path: Path) -> None:
    """Attention and GELU are many nodes there."""
    (tmp_path / "export.toml").write_text("opset = 18\n")
    export([str(run), str(tmp_path / "tiny"), "--config", str(tmp_path / "export.toml")])
    source, _ = read_encoder(run)
    wanted = source.state_dict()
    found, _ = read_encoder(tmp_path / "tiny")
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())


def test_of_equal_tensors_the_file_keeps_one(tmp_path: Path) -> None:
    """As before the first step: all biases zero, all norms one."""
    objective = build(chosen())
    open_run(tmp_path / "run", config_of(chosen()))
    checkpoint.save(tmp_path / "run", 1, objective, adamw(objective, chosen()))
    export([str(tmp_path / "run"), str(tmp_path / "tiny")])
    found, _ = read_encoder(tmp_path / "tiny")
    wanted = objective.kept.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())


def test_at_another_size(bundle: Path) -> None:
    """What the source computes there, by its own interpolation."""
    target = build(chosen("simclr", image_size=24))
    lines = initialize(target, bundle)
    source, _ = read_encoder(bundle)
    assert close(tokens(target.kept, 24), tokens(source, 24))
    assert lines[1:] == ["positions interpolated from 4 × 4 patches to 6 × 6"]


def test_weights_in_half_precision(run: Path, bundle: Path) -> None:
    path = bundle / "1" / "model.onnx"
    model = onnx.load(path)
    halve(model)
    onnx.save(model, path)
    accept(bundle)
    source, _ = read_encoder(run)
    found, _ = read_encoder(bundle)
    wanted = source.half().float().state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())


def halve(model: onnx.ModelProto) -> None:
    """Store every float tensor of the encoder as float16, with a Cast behind it."""
    graph, casts = model.graph, []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.dims:
            stored = f"{tensor.name}.half"
            casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), stored))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def accept(bundle: Path) -> None:
    """Have `encoder.json` agree with a graph that was changed."""
    manifest = json.loads((bundle / "encoder.json").read_text()) | {"sha256": sha256_of(bundle / "1" / "model.onnx")}
    (bundle / "encoder.json").write_text(json.dumps(manifest))


def test_the_shipped_bundle_computes_what_onnx_runtime_does() -> None:
    manifest = load_manifest(SHIPPED)
    images = np.random.default_rng(4).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    session = ort.InferenceSession(SHIPPED / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    wanted = session.run(["cls_embedding", "mean_embedding"], {"image": images})
    encoder, _ = read_encoder(SHIPPED)
    x = eval_view(torch.from_numpy(images).permute(0, 3, 1, 2))
    with torch.no_grad():
        for pooling, values in zip(("cls", "mean"), wanted, strict=True):
            assert close(encoder.pooled(x, pooling), torch.from_numpy(values), 1e-4)
    assert sum(value.numel() for value in encoder.parameters()) == manifest.parameters
    assert architecture_of(SHIPPED) == ViTConfig(width=128, depth=4, heads=4, stem="conv")


def test_registers_that_the_source_lacks_are_new() -> None:
    config = {"image_size": 16, "width": 24, "depth": 1, "heads": 2}
    source, target = ViT(ViTConfig(**config, registers=1)), ViT(ViTConfig(**config, registers=3))
    scramble(source)
    fresh_tokens, fresh_positions = target.reg_token.detach().clone(), target.pos_embed.detach().clone()
    assert transfer(source, target) == ["2 of 3 registers are new"]
    assert torch.equal(target.reg_token[:, :1], source.reg_token)
    assert torch.equal(target.reg_token[:, 1:], fresh_tokens[:, 1:])
    assert torch.equal(target.pos_embed[:, :2], source.pos_embed[:, :2])  # CLS and the register
    assert torch.equal(target.pos_embed[:, 2:4], fresh_positions[:, 2:4])
    assert torch.equal(target.pos_embed[:, 4:], source.pos_embed[:, 2:])


def test_positions_for_patches_alone() -> None:
    """As timm's register models have them: the prefix gets zeros, and the numbers are the same."""
    config = {"image_size": 16, "width": 24, "depth": 2, "heads": 2, "registers": 2}
    source, target = ViT(ViTConfig(**config, no_embed_class=True)), ViT(ViTConfig(**config))
    scramble(source)
    transfer(source, target)
    assert close(tokens(target, 16), tokens(source, 16))
    assert close(tokens(target, 24), tokens(source, 24))


def test_differences_are_named_with_their_flags() -> None:
    source = ViT(ViTConfig(image_size=16, width=24, depth=2, heads=2, stem="conv", registers=2))
    target = ViT(ViTConfig(image_size=16, width=24, depth=1, heads=3))
    before = [value.clone() for value in target.state_dict().values()]
    with pytest.raises(InvalidRequest) as refused:
        transfer(source, target)
    message = str(refused.value)
    assert "depth is 2, here 1" in message
    assert message.endswith("set --depth 2 --heads 2 --registers 2 --stem conv")
    assert all(torch.equal(a, b) for a, b in zip(before, target.state_dict().values(), strict=True))


def test_resnets_from_a_run(tmp_path: Path) -> None:
    settings = SETTINGS["simclr"](data=["unread"], backbone="resnet18", projection_hidden=32)
    source = write_run(tmp_path, settings)
    target = build(settings)
    initialize(target, tmp_path)
    wanted = source.kept.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in target.kept.state_dict().items())
    assert close(tokens(target.kept, 24), tokens(source.kept, 24))
    with pytest.raises(InvalidRequest, match=r"set --backbone resnet18 --stem cifar$"):
        transfer(source.kept, ResNet(ResNetConfig(16, 50, "imagenet")))
    with pytest.raises(InvalidRequest, match="there is a ResNet, here a Vision Transformer"):
        transfer(source.kept, build_encoder(ViTConfig()))


def test_a_resnet_bundle_is_refused_with_the_reason(bundle: Path) -> None:
    text = (bundle / "encoder.json").read_text()
    (bundle / "encoder.json").write_text(text.replace('"patch_size": 4', '"patch_size": null'))
    with pytest.raises(InvalidRequest, match="batch norm"):
        initialize(build(chosen()), bundle)


def test_a_graph_that_computes_something_else_is_refused(bundle: Path) -> None:
    """The same weights behind another normalization of the picture."""
    path = bundle / "1" / "model.onnx"
    model = onnx.load(path)
    divided = next(node for node in model.graph.node if node.op_type == "Sub")
    divided.op_type = "Add"
    onnx.save(model, path)
    accept(bundle)
    with pytest.raises(InvalidRequest, match="does not compute what the graph computes"):
        initialize(build(chosen()), bundle)


def test_a_graph_of_another_kind_is_refused(bundle: Path) -> None:
    path = bundle / "1" / "model.onnx"
    model = onnx.load(path)
    last = max(i for i, node in enumerate(model.graph.node) if node.op_type == "LayerNormalization")
    model.graph.node[last].op_type = "RMSNormalization"
    onnx.save(model, path)
    accept(bundle)
    with pytest.raises(InvalidRequest, match="6 norms and 12 linear maps"):
        initialize(build(chosen()), bundle)


def test_what_is_neither(tmp_path: Path) -> None:
    target = build(chosen())
    with pytest.raises(InvalidRequest, match="neither a run folder"):
        initialize(target, tmp_path / "nothing")
    empty = tmp_path / "empty"
    open_run(empty, config_of(chosen()))
    with pytest.raises(InvalidRequest, match="no checkpoint"):
        initialize(target, empty)
