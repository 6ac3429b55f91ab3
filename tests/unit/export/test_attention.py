"""Which attention is served: of any block, or the rollout over all, against weights computed by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public_layouts import attention_by_hand, dinov3, rollout_by_hand, rotary, vit

from patchsight_export.__main__ import main
from patchsight_export.attention import blocks_of, from_cls, resolve
from patchsight_export.public_encoder import PublicViT, wrap
from patchsight_export.source import read_run
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import load_manifest
from patchsight_serve.model_card import card
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.trial_pictures import noise
from patchsight_train.views import MEAN, STD, eval_view
from patchsight_train.vit import ViT

MODELS = {"absolute": vit, "rotary": rotary, "DINOv3": dinov3}


@pytest.mark.parametrize(
    ("asked", "kind", "blocks"),
    [("last", "last", [3]), ("rollout", "rollout", [0, 1, 2, 3]), (1, 1, [0]), (3, 3, [2]), (-2, 3, [2]), (-4, 1, [0]),
     (4, "last", [3]), (-1, "last", [3])],
)  # fmt: skip
def test_a_block_is_counted_from_one_or_from_the_end(asked: Any, kind: Any, blocks: list[int]) -> None:
    assert resolve(asked, 4) == kind
    assert blocks_of(kind, 4) == blocks


@pytest.mark.parametrize("asked", [0, 5, -5])
def test_a_block_that_is_not_there_is_named(asked: int) -> None:
    with pytest.raises(InvalidRequest, match=f"--attention {asked}: the encoder has 4 blocks: 1 to 4, or -4 to -1"):
        resolve(asked, 4)


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_every_block_of_timm_s_networks(kind: str) -> None:
    model, x = MODELS[kind](), torch.randn(2, 3, 28, 28)
    encoder = wrap(model, 28, MEAN, STD, kind)
    assert isinstance(encoder, PublicViT)
    tokens, weights = encoder.attend(x, [0, 1, 2])
    torch.testing.assert_close(tokens, encoder(x), atol=2e-5, rtol=1e-5)
    for number, found in enumerate(weights):
        torch.testing.assert_close(found, attention_by_hand(model, x, number), atol=1e-5, rtol=1e-4)
        (alone,) = encoder.attend(x, [number])[1]
        torch.testing.assert_close(alone, found, atol=1e-6, rtol=1e-5)
    assert (weights[0] - weights[1]).abs().max() > 0.01
    rollout = from_cls(weights, "rollout")
    torch.testing.assert_close(rollout, rollout_by_hand(model, x)[:, None, 0].float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rollout.sum(dim=-1), torch.ones(2, 1))


def in_numpy(encoder: ViT, images: np.ndarray) -> list[np.ndarray]:
    """All blocks' weights of our own ViT `(N, h, T, T)`, from the queries and keys that each block has."""
    inputs: list[torch.Tensor] = []
    hooks = [block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in encoder.blocks]
    with torch.no_grad():
        encoder(eval_view(torch.from_numpy(images).permute(0, 3, 1, 2)))
        pairs = [block.attn.heads_of(x)[:2] for block, x in zip(encoder.blocks, inputs, strict=True)]
    for hook in hooks:
        hook.remove()
    weights = []
    for q, k in pairs:
        logits = np.einsum("nhqd,nhkd->nhqk", q.double().numpy(), k.double().numpy()) / q.shape[-1] ** 0.5
        e = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights.append(e / e.sum(axis=-1, keepdims=True))
    return weights


@pytest.mark.parametrize(("flag", "stored"), [("rollout", "rollout"), ("-3", 1)])
def test_through_the_command(flag: str, stored: Any, run: Path, tmp_path: Path) -> None:
    """A run of 3 blocks, 2 heads, 1 CLS token and 2 registers; 4 × 4 patches."""
    target = tmp_path / "repository" / "x"
    main([str(run), str(target), f"--attention={flag}"])
    manifest, images = load_manifest(target), noise(16, 5)
    encoder = read_run(run).encoder
    assert isinstance(encoder, ViT)
    weights = in_numpy(encoder, images)
    if flag == "rollout":
        product = np.eye(19)[None]
        for each in weights:
            product = (each.mean(axis=1) + np.eye(19)) / 2 @ product
        wanted = product[:, None, 0, 3:].reshape(5, 1, 4, 4)
    else:
        wanted = weights[0][:, :, 0, 3:].reshape(5, 2, 4, 4)
    assert manifest.attention == stored
    assert manifest.outputs["attention"] == wanted.shape[1:]
    found = OrtEncoder(target, threads=1).run(images, ["attention"])["attention"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * wanted.max())
    assert ("rollout over all blocks" if flag == "rollout" else "of block 1, from CLS") in card(manifest, 1)


def test_the_last_block_is_unsaid(bundle: Path, run: Path, tmp_path: Path) -> None:
    """So that bundles of before and after are equal, to the byte."""
    target = tmp_path / "repository" / "tiny"
    main([str(run), str(target), "--attention", "3"])
    assert (target / "1" / "model.onnx").read_bytes() == (bundle / "1" / "model.onnx").read_bytes()
    assert "attention" not in load_manifest(target).metadata()


def test_a_block_too_many_leaves_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(run), str(tmp_path / "repository" / "x"), "--attention", "7"])
    assert "--attention 7: the encoder has 3 blocks" in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()
