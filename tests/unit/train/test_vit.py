import copy

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from timm.layers import resample_abs_pos_embed
from torch import Generator, Tensor, nn

from patchsight_train.architecture import ViTConfig
from patchsight_train.vit import ViT, resize_positions, sincos_positions

CONFIGS = [
    ViTConfig(image_size=size, patch_size=patch, width=width, depth=depth, heads=heads, mlp_ratio=ratio,
              registers=registers, no_embed_class=no_embed_class)
    for size, patch, width, depth, heads, ratio in (
        (32, 4, 48, 3, 3, 4.0), (24, 8, 32, 2, 1, 2.0), (28, 14, 64, 1, 8, 3.0),
    )
    for registers in (0, 4)
    for no_embed_class in (False, True)
]  # fmt: skip


def scrambled(module: nn.Module) -> nn.Module:
    """Every parameter far from its initial value, so that none can be forgotten."""
    generator = Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def pair(config: ViTConfig) -> tuple[ViT, timm_vit.VisionTransformer]:
    """Our encoder and timm's with the same weights; the loading is strict both ways."""
    ours = ViT(config)
    theirs = timm_vit.VisionTransformer(
        img_size=config.image_size, patch_size=config.patch_size, embed_dim=config.width, depth=config.depth,
        num_heads=config.heads, mlp_ratio=config.mlp_ratio, class_token=True, reg_tokens=config.registers,
        no_embed_class=config.no_embed_class, num_classes=0, dynamic_img_size=True,
    )  # fmt: skip
    scrambled(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval(), theirs


def images(config: ViTConfig, N: int = 5) -> Tensor:
    return torch.randn(N, 3, config.image_size, config.image_size, generator=Generator().manual_seed(2))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["sdpa", "explicit"])
def test_tokens_are_those_of_timm(config: ViTConfig, grad: bool) -> None:
    ours, theirs = pair(config)
    x = images(config)
    with torch.set_grad_enabled(grad):
        found = ours(x)
    assert found.shape == (5, config.prefix_tokens + config.grid**2, config.width)
    torch.testing.assert_close(found, theirs.forward_features(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_attention_of_the_last_block_is_that_of_timm(config: ViTConfig) -> None:
    ours, theirs = pair(config)
    x = images(config)
    seen: list[Tensor] = []
    last = theirs.blocks[-1].attn
    last.fused_attn = False
    last.attn_drop.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    expected = theirs.forward_features(x)
    tokens, attention = ours.with_attention(x)
    torch.testing.assert_close(attention, seen[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]), atol=1e-5, rtol=0)
    cls_to_patches = attention[:, :, 0, config.prefix_tokens :].sum(dim=-1)
    assert (cls_to_patches < 1).all()  # the weight on the prefix tokens is missing


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 2), (5, 3), (11, 11)])
def test_pictures_of_another_size_are_those_of_timm(config: ViTConfig, rows: int, columns: int) -> None:
    """Smaller ones, larger ones, and others than squares; timm interpolates the positions with `dynamic_img_size`."""
    ours, theirs = pair(config)
    p = config.patch_size
    x = torch.randn(2, 3, rows * p, columns * p, generator=Generator().manual_seed(3))
    found = ours(x)
    assert found.shape == (2, config.prefix_tokens + rows * columns, config.width)
    torch.testing.assert_close(found, theirs.forward_features(x), atol=2e-5, rtol=0)
    torch.testing.assert_close(ours.with_attention(x)[0], found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", [(4, 4), (2, 2), (3, 9), (14, 14)])
def test_positions_are_interpolated_as_in_timm(prefix: int, grid: tuple[int, int], generator: Generator) -> None:
    positions = torch.randn(1, prefix + 49, 8, generator=generator)
    expected = resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=prefix)
    torch.testing.assert_close(resize_positions(positions, prefix, grid), expected, atol=1e-6, rtol=0)


def test_half_precision_positions_are_interpolated_in_float32(generator: Generator) -> None:
    positions = torch.randn(1, 17, 8, generator=generator).bfloat16()
    found = resize_positions(positions, 1, (2, 2))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, resize_positions(positions.float(), 1, (2, 2)).bfloat16(), atol=0, rtol=0)


def test_at_their_own_size_positions_are_the_parameter_itself() -> None:
    vit = ViT(CONFIGS[0])
    assert vit.positions(images(CONFIGS[0], 1)) is vit.pos_embed


def saved_numbers(vit: ViT, x: Tensor) -> int:
    """How many numbers the forward pass keeps for the backward pass."""
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        vit(x)
    return sum(sizes)


def test_recomputed_activations_change_no_gradient() -> None:
    config = ViTConfig(image_size=16, patch_size=4, width=32, depth=4, heads=2, registers=1)
    plain = ViT(config)
    scrambled(plain)
    frugal = copy.deepcopy(plain)
    frugal.recompute = True
    x = images(config)
    tokens = [vit(x) for vit in (plain, frugal)]
    assert torch.equal(*tokens)
    for each in tokens:
        each.square().mean().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), frugal.named_parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        assert (a.grad != 0).any(), name
        torch.testing.assert_close(a.grad, b.grad, atol=1e-7, rtol=1e-5)
    assert saved_numbers(frugal, x) < saved_numbers(plain, x) / 4


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_batch_of_one_equals_batch_of_n(stem: str) -> None:
    config = ViTConfig(image_size=32, patch_size=4, width=48, depth=2, heads=3, stem=stem)  # type: ignore[arg-type]
    vit = scrambled(ViT(config))
    x = images(config, 4)
    one_by_one = torch.cat([vit(picture[None]) for picture in x])
    torch.testing.assert_close(vit(x), one_by_one, atol=1e-5, rtol=0)
    assert (one_by_one[0] - one_by_one[1]).abs().max() > 0.1


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
def test_conv_stem_gives_one_token_for_each_patch(patch_size: int) -> None:
    config = ViTConfig(image_size=32, patch_size=patch_size, width=32, depth=1, heads=2, stem="conv")
    assert ViT(config)(images(config, 2)).shape == (2, 1 + (32 // patch_size) ** 2, 32)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"image_size": 30, "patch_size": 4}, "image_size 30 is not a multiple of patch_size 4"),
        ({"width": 50, "heads": 3}, "width 50 is not a multiple of heads 3"),
        ({"stem": "conv", "patch_size": 1}, "patch_size 1 is no power of 2"),
        ({"stem": "conv", "image_size": 36, "patch_size": 6}, "patch_size 6 is no power of 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ViTConfig(**wrong)  # type: ignore[arg-type]


def slow_sincos(width: int, grid: int) -> Tensor:
    """Number by number as the MAE authors' `get_2d_sincos_pos_embed` says: column first, sines before cosines."""
    rows = []
    for y in range(grid):
        for x in range(grid):
            row: list[float] = []
            for position in (x, y):
                angles = [position / 10_000 ** (i / (width / 4)) for i in range(width // 4)]
                row += [float(torch.tensor(a, dtype=torch.float64).sin()) for a in angles]
                row += [float(torch.tensor(a, dtype=torch.float64).cos()) for a in angles]
            rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize(("width", "grid"), [(16, 2), (48, 5), (192, 8)])
def test_sincos_positions(width: int, grid: int) -> None:
    torch.testing.assert_close(sincos_positions(width, grid), slow_sincos(width, grid), atol=1e-6, rtol=0)


def test_sincos_positions_need_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="not 18"):
        sincos_positions(18, 2)
