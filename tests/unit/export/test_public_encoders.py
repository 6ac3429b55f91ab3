"""Public encoders: the networks that `public_layouts` gives are the oracle for what their checkpoints compute."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
import torchvision
from public_layouts import (
    RESNETS,
    VITS,
    WideResNet,
    attention_by_hand,
    full_dino,
    plain_dino,
    prefixed,
    randomized,
    registers,
    resnet,
    rotary,
    simclr_v2,
    vit,
    without_cls,
)
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from patchsight_export.__main__ import main
from patchsight_export.public_encoder import PublicEncoder, PublicViT, wrap
from patchsight_export.public_layout import build_model
from patchsight_export.to_onnx import served, to_onnx
from patchsight_export.weights_file import find_encoder
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import load_manifest
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.trial_pictures import noise
from patchsight_train.views import MEAN, STD, eval_view


def load(path: Path, **settings: Any) -> PublicEncoder:
    found = find_encoder(path)
    model, size, _ = build_model(found.weights, settings.get("image_size"), settings.get("heads"), str(path))
    return wrap(model, size, MEAN, STD, str(path))


def normalized(images: np.ndarray, mean: Any, std: Any) -> Tensor:
    """uint8 `(N, H, W, 3)` as a model of this normalization takes them."""
    m, s = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - m) / s


def close(found: np.ndarray, wanted: np.ndarray, share: float) -> None:
    """Within this share of the largest value."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=share * np.abs(wanted).max())


@torch.no_grad()
@pytest.mark.parametrize("family", VITS)
def test_a_vit_of_any_layout_computes_what_timm_does(family: str, tmp_path: Path) -> None:
    model, state = VITS[family]()
    torch.save(state, tmp_path / "checkpoint.pth")
    encoder = load(tmp_path / "checkpoint.pth")
    assert isinstance(encoder, PublicViT)
    x = torch.randn(3, 3, 28, 28)
    tokens, (attention,) = encoder.attend(x, [2])
    torch.testing.assert_close(tokens, model.forward_features(x), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(encoder(x), tokens, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(attention, attention_by_hand(model, x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layout", RESNETS)
def test_a_resnet_of_any_layout_computes_what_its_library_does(layout: str, tmp_path: Path) -> None:
    trunk, state = resnet(layout)
    torch.save(state, tmp_path / "checkpoint.ckpt")
    encoder = load(tmp_path / "checkpoint.ckpt", image_size=64)
    x = torch.randn(2, 3, 64, 64)
    wanted = trunk(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(x), wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4)
    assert encoder.config.grid**2 == wanted.shape[1]


@torch.no_grad()
def test_positions_are_interpolated_as_timm_does(tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "x.pth")
    larger = VisionTransformer(
        img_size=42, patch_size=7, embed_dim=128, depth=3, num_heads=2, num_classes=0, weight_init="skip"
    ).eval()
    timm.models.load_checkpoint(
        larger, str(tmp_path / "x.pth"), filter_fn=timm.models.vision_transformer.checkpoint_filter_fn
    )
    encoder, x = load(tmp_path / "x.pth", image_size=42), torch.randn(2, 3, 42, 42)
    torch.testing.assert_close(encoder(x), larger.forward_features(x), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["registers", "rotary", "resnet"])
def test_the_graph_computes_what_timm_does(kind: str) -> None:
    """DINOv3's parts as well: rotary positions, registers, layer scale. Another normalization than ours is inside."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    if kind == "registers":
        model = vit(init_values=1.0, reg_tokens=4, no_embed_class=True)
    elif kind == "rotary":
        model = rotary()
    else:
        model = randomized(timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=0))  # type: ignore[arg-type]
    size = 64 if kind == "resnet" else 28
    encoder = wrap(model, size, mean, std, kind)
    outputs = (
        ("mean_embedding",) if kind == "resnet" else ("cls_embedding", "mean_embedding", "attention", "patch_tokens")
    )
    graph = to_onnx(served(encoder), size, outputs)
    images = noise(size, 3)
    found = dict(
        zip(outputs, ort.InferenceSession(graph.SerializeToString()).run(None, {"image": images}), strict=True)
    )
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
        std
    ).view(3, 1, 1)
    tokens = model.forward_features(x)
    if kind == "resnet":
        wanted = {"mean_embedding": tokens.mean(dim=(2, 3))}
    else:
        P = model.num_prefix_tokens
        wanted = {
            "cls_embedding": tokens[:, 0],
            "mean_embedding": tokens[:, P:].mean(dim=1),
            "patch_tokens": tokens[:, P:].reshape(3, 4, 4, -1),
        }
    if kind != "resnet":
        wanted["attention"] = attention_by_hand(model, x)[:, :, 0, P:].reshape(3, 2, 4, 4)
    for name, value in wanted.items():
        np.testing.assert_allclose(
            found[name], value.numpy(), rtol=0, atol=1e-4 * value.abs().max().item(), err_msg=name
        )
    if "attention" in found:
        sums = found["attention"].sum(axis=(2, 3))
        assert ((sums > 0) & (sums < 1)).all()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of registers, through the command."""
    folder = tmp_path_factory.mktemp("public")
    torch.save(registers()[1], folder / "weights.pth")
    told = {"license": "CC-BY-NC-4.0", "dataset": "noise", "objective": "dinov2", "weights": "fp16"}
    flags = [word for name, value in told.items() for word in (f"--{name}", value)]
    main([str(folder / "weights.pth"), str(folder / "repository" / "x"), *flags])
    return folder / "repository" / "x"


def test_the_bundle_says_where_its_weights_are_from(exported: Path) -> None:
    manifest = load_manifest(exported)
    assert manifest.architecture == "ViT 128×3, 2 heads, patch 7, 4 registers"
    assert (manifest.prefix_tokens, manifest.recommended, manifest.objective) == (5, "cls", "dinov2")
    assert (manifest.license, manifest.data) == ("CC-BY-NC-4.0", "noise")
    assert "weights.pth, sha256 " in manifest.recipe
    assert "/" not in manifest.recipe
    images = noise(28, 2)
    model = registers()[0].half().float()
    tokens = model.forward_features(eval_view(torch.from_numpy(images).permute(0, 3, 1, 2))).detach().numpy()
    found = OrtEncoder(exported, threads=1).run(images, ["cls_embedding"])["cls_embedding"]
    close(found, tokens[:, 0], 1e-4)


def test_timm_by_name_with_weights_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = randomized(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32))
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    target = tmp_path / "repository" / "x"
    name, file = "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", str(tmp_path / "x.safetensors")
    main([name, str(target), "--checkpoint", file, "--image-size", "32"])
    manifest, cfg = load_manifest(target), model.pretrained_cfg
    images = noise(32, 2)
    x = normalized(images, cfg["mean"], cfg["std"])
    with torch.no_grad():
        wanted = model.forward_features(x)[:, 0].numpy()
    found = OrtEncoder(target, threads=1).run(images, ["cls_embedding"])["cls_embedding"]
    close(found, wanted, 1e-4)
    assert manifest.transform.resize == round(32 / cfg["crop_pct"])
    assert "timm:vit_tiny_patch16_224" in manifest.recipe
    assert json.loads(manifest.metadata())["license"] == "apache-2.0"
    assert "LICENSE" not in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    target = tmp_path / "repository" / "x"
    with pytest.raises(SystemExit) as stopped:
        main([arguments[0], str(target), *arguments[1:]])
    assert stopped.value.code == 1
    assert not target.parent.exists()
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_a_restricted_license_is_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(plain_dino()[1], tmp_path / "x.pth")
    main([str(tmp_path / "x.pth"), str(tmp_path / "repository" / "x"), "--license", "cc-by-nc-4.0"])
    assert "LICENSE: cc-by-nc-4.0: restricted" in capsys.readouterr().out


DINO = plain_dino()[1]
WIDE = {"conv1.weight": torch.ones(128, 3, 7, 7)}
SELECTIVE = simclr_v2(WideResNet(1).state_dict()) | {
    "net.1.blocks.0.net.2.main_conv.0.weight": torch.ones(128, 64, 3, 3)
}
BROKEN: dict[str, tuple[Any, str]] = {
    "empty": (b"", "is empty"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a Git LFS pointer"),
    "truncated": (b"PK\x03\x04 and no more", "cannot be read as a checkpoint"),
    "text": (b"hello, I am no checkpoint at all", "cannot be read as a checkpoint"),
    "something else": ({"word_embeddings.weight": torch.ones(3, 4)}, "holds no encoder that is known"),
    "a list": ([torch.ones(2)], "holds a list, not a dictionary of tensors"),
    "one lacks": ({k: v for k, v in DINO.items() if k != "blocks.1.norm1.bias"}, "blocks.1.norm1.bias is missing"),
    "one too many": (DINO | {"blocks.1.extra": torch.ones(1)}, "blocks.1.extra is unknown"),
    "one of another shape": (DINO | {"norm.bias": torch.ones(5)}, "norm.bias is (5,) instead of (128,)"),
    "no square": (DINO | {"pos_embed": torch.zeros(1, 18, 128)}, "has 18 positions, not one for CLS and a square's"),
    "no positions": ({k: v for k, v in DINO.items() if k != "pos_embed"}, "timm:NAME --checkpoint"),
    "not finite": (DINO | {"cls_token": torch.full((1, 1, 128), torch.nan)}, "cls_token holds values that are not"),
    "two": (prefixed(DINO, "a.") | prefixed(DINO, "b."), "choose one with --prefix: 'a.', 'b.'"),
    "wide stem alone": (torchvision.models.resnet18().state_dict() | WIDE, "bn1.bias is (64,) instead of (128,)"),
    "selective kernels": (SELECTIVE, "is a ResNet with selective kernels (net.1.blocks.0.net.2.main_conv.0.weight)"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_encoder_is_said_and_leaves_nothing(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = BROKEN[kind]
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert said in refused(capsys, tmp_path, str(path))


def test_other_mistakes_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such file" in refused(capsys, tmp_path, str(tmp_path / "nothing.pth"))
    assert "timm" in refused(capsys, tmp_path, "timm:vit_gigantic_patch99")
    path = str(tmp_path / "x.pth")
    torch.save(full_dino()[1], path)
    assert "no tensor begins so" in refused(capsys, tmp_path, path, "--prefix", "pupil")
    assert "not a multiple of" in refused(capsys, tmp_path, path, "--image-size", "30")

    def offline(*_: object, **__: object) -> None:
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(timm, "create_model", offline)
    assert "its weights cannot be had: the hub cannot be reached" in refused(
        capsys, tmp_path, "timm:vit_tiny_patch16_224"
    )


def test_nothing_is_executed_that_a_file_brings_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Malice:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"model": Malice()}, tmp_path / "x.pth")
    assert "cannot be read as a checkpoint" in refused(capsys, tmp_path, str(tmp_path / "x.pth"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("prefix", "factor"), [("student.module", 1.0), ("teacher.backbone", 0.0)])
def test_another_of_several_encoders_can_be_chosen(prefix: str, factor: float, tmp_path: Path) -> None:
    teacher, state = full_dino()
    torch.save(state, tmp_path / "x.pth")
    found = find_encoder(tmp_path / "x.pth", prefix)
    torch.testing.assert_close(found.weights["cls_token"], teacher.cls_token.detach() + factor)


def test_the_teacher_comes_before_the_student_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    torch.save(full_dino()[1], tmp_path / "x.pth")
    found = find_encoder(tmp_path / "x.pth")
    assert found.where == "teacher.backbone"
    assert found.left_out["student"] == len(found.weights) + 2
    assert found.left_out["optimizer"] == 1


def test_a_model_fine_tuned_with_labels_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="was trained to the end with labels"):
        wrap(vit(global_pool="avg"), 28, MEAN, STD, "x")


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_without_cls_there_are_patches_and_their_mean(registers: int, tmp_path: Path) -> None:
    """Through the command, against timm's own pooling; registers, where there are some, are no patches."""
    model = without_cls(reg_tokens=registers, no_embed_class=True)
    torch.save(model.state_dict() | {"attn_pool.latent": torch.ones(1, 1, 128)}, tmp_path / "x.pth")
    target = tmp_path / "repository" / "x"
    main([str(tmp_path / "x.pth"), str(target)])
    manifest, images = load_manifest(target), noise(28, 3)
    assert (manifest.num_heads, manifest.prefix_tokens, manifest.recommended) == (None, 0, "mean")
    assert manifest.outputs == {"mean_embedding": (128,), "patch_tokens": (4, 4, 128)}
    assert "no CLS token" in manifest.architecture
    found = OrtEncoder(target, threads=1).run(images, list(manifest.outputs))
    tokens = model.forward_features(eval_view(torch.from_numpy(images).permute(0, 3, 1, 2)))
    close(found["mean_embedding"], model.forward_head(tokens, pre_logits=True).numpy(), 1e-5)
    close(found["patch_tokens"], tokens[:, registers:].reshape(3, 4, 4, 128).numpy(), 1e-5)


@torch.no_grad()
def test_siglip_by_its_name_in_timm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its attention pooling is not part of the bundle; what cannot be asked of it is said."""
    name = "vit_base_patch16_siglip_224"
    model = randomized(timm.create_model(name, num_classes=0, img_size=32))
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    told = [f"timm:{name}", "--checkpoint", str(tmp_path / "x.safetensors"), "--image-size", "32"]
    assert "no CLS token; its embedding is the mean" in refused(capsys, tmp_path, *told, "--recommend", "cls")
    assert "no CLS token, and no attention" in refused(capsys, tmp_path, *told, "--attention", "rollout")
    target = tmp_path / "repository" / "x"
    main([told[0], str(target), *told[1:], "--dynamic-size"])
    encoder, cfg = OrtEncoder(target, threads=1), model.pretrained_cfg
    assert (encoder.manifest.dynamic_size, encoder.manifest.num_heads) == (True, None)
    for side in (32, 48):  # the second as timm interpolates its positions, once and for all
        images = noise(side, 2)
        model.set_input_size(img_size=side)
        wanted = model.forward_features(normalized(images, cfg["mean"], cfg["std"])).mean(dim=1).numpy()
        close(encoder.run(images, ["mean_embedding"])["mean_embedding"], wanted, 1e-4)
