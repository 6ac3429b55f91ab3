from collections.abc import Callable

import pytest
import torch
from lightly.models import utils as lightly
from torch import Generator, Tensor

from patchsight_train.architecture import ViTConfig
from patchsight_train.data import Images
from patchsight_train.mae import MAE, masked_pixel_loss, patchify, random_masking, take, unpatchify
from patchsight_train.objective import Objective
from patchsight_train.objective_settings import MAESettings
from patchsight_train.views import denormalize
from patchsight_train.vit import ViT, sincos_positions


def masking(N: int, L: int, ratio: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    return random_masking(torch.rand(N, L, generator=generator), ratio)


@pytest.fixture
def mae(settings: Callable[..., MAESettings], generator: Generator) -> MAE:
    """With one register; every parameter is random, so that none can be forgotten."""
    config = ViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, registers=1)
    model = MAE(ViT(config), settings("mae"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("L", [16, 49, 64, 196])
@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.6])
def test_exactly_the_asked_share_is_kept(L: int, ratio: float, generator: Generator) -> None:
    keep, restore, mask = masking(32, L, ratio, generator)
    V = round(L * (1 - ratio))
    assert keep.shape == (32, V)
    assert (mask.sum(dim=1) == L - V).all()
    for i in range(32):
        assert sorted(restore[i].tolist()) == list(range(L))
        assert sorted(keep[i].tolist()) == (mask[i] == 0).nonzero().squeeze(1).tolist()
    assert len(mask.unique(dim=0)) > 30  # each image has its own


@pytest.mark.parametrize(("ratio", "V"), [(0.001, 15), (0.999, 1)])
def test_one_patch_at_least_is_visible_and_one_is_hidden(ratio: float, V: int, generator: Generator) -> None:
    keep, _, mask = masking(3, 16, ratio, generator)
    assert keep.shape == (3, V)
    assert (mask.sum(dim=1) == 16 - V).all()


def test_every_patch_is_hidden_equally_often(generator: Generator) -> None:
    _, _, mask = masking(8_000, 16, 0.75, generator)
    error = (0.75 * 0.25 / 8_000) ** 0.5
    assert ((mask.mean(dim=0) - 0.75).abs() < 4 * error).all()


def test_masks_follow_the_generator() -> None:
    first, again, other = (masking(4, 64, 0.75, Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unshuffling_is_exact(generator: Generator) -> None:
    x = torch.randn(5, 49, 8, generator=generator)
    keep, restore, mask = masking(5, 49, 0.75, generator)
    visible = take(x, keep)
    hidden = torch.full((5, 49 - keep.shape[1], 8), torch.nan)
    whole = take(torch.cat([visible, hidden], dim=1), restore)
    assert torch.equal(whole[mask == 0], x[mask == 0])
    assert whole[mask == 1].isnan().all()
    ids = torch.arange(49).expand(5, -1)
    shuffled = torch.stack([torch.cat([k, torch.tensor([i for i in range(49) if i not in k])]) for k in keep])
    full = torch.stack([ids[n][restore[n].argsort()] for n in range(5)])  # visible first, then hidden
    assert torch.equal(full[:, : keep.shape[1]], keep)
    assert torch.equal(take(take(x, full), restore), x)
    assert torch.equal(full.sort(dim=1).values, shuffled.sort(dim=1).values)


@pytest.mark.parametrize(("p", "height", "width"), [(4, 16, 16), (2, 6, 10), (8, 8, 16)])
def test_patchify_against_a_loop(p: int, height: int, width: int, generator: Generator) -> None:
    x = torch.randn(2, 3, height, width, generator=generator)
    expected = []
    for n in range(2):
        patches = []
        for row in range(height // p):
            for col in range(width // p):
                values = [x[n, c, row * p + i, col * p + j] for i in range(p) for j in range(p) for c in range(3)]
                patches.append(torch.stack(values))
        expected.append(torch.stack(patches))
    assert torch.equal(patchify(x, p), torch.stack(expected))


@pytest.mark.parametrize("normalize_pixels", [True, False])
def test_loss_against_a_loop_over_hidden_patches(normalize_pixels: bool, generator: Generator) -> None:
    pred, target = torch.randn(3, 16, 12, generator=generator), 3 + 2 * torch.randn(3, 16, 12, generator=generator)
    target[0, 3] = 0.5  # a patch of one color: no variance to divide by
    _, _, mask = masking(3, 16, 0.75, generator)
    mask[0, 3] = 1
    errors = []
    for n in range(3):
        for patch in range(16):
            if mask[n, patch] == 0:
                continue
            values = target[n, patch].double()
            if normalize_pixels:
                mean = values.sum() / 12
                variance = ((values - mean) ** 2).sum() / 11
                values = (values - mean) / (variance + 1e-6).sqrt()
            errors.append(((pred[n, patch].double() - values) ** 2).sum() / 12)
    found = masked_pixel_loss(pred, target, mask, normalize_pixels)
    torch.testing.assert_close(found.double(), sum(errors) / torch.tensor(len(errors)), atol=1e-5, rtol=1e-5)


def test_visible_predictions_cost_nothing(generator: Generator) -> None:
    pred, target = torch.randn(2, 3, 16, 12, generator=generator)
    _, _, mask = masking(3, 16, 0.75, generator)
    pred.requires_grad_()
    loss = masked_pixel_loss(pred, target, mask, True)
    loss.backward()  # type: ignore[no-untyped-call]
    assert pred.grad is not None
    assert (pred.grad[mask == 0] == 0).all()
    assert (pred.grad[mask == 1] != 0).all()
    changed = torch.where(mask.unsqueeze(-1) == 0, pred + 100, pred)
    assert torch.equal(masked_pixel_loss(changed, target, mask, True), loss)


def test_loss_of_half_precision_predictions_is_float32(generator: Generator) -> None:
    pred, target = torch.randn(2, 3, 16, 12, generator=generator)
    _, _, mask = masking(3, 16, 0.75, generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_pixel_loss(pred.bfloat16(), target, mask, True)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, masked_pixel_loss(pred.bfloat16().float(), target, mask, True))


def test_the_encoder_never_sees_hidden_patches(mae: MAE, generator: Generator) -> None:
    x = torch.randn(4, 3, 16, 16, generator=generator)
    keep, _, mask = masking(4, 16, 0.75, generator)
    hidden = mask.view(4, 1, 4, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    latent = mae.encode(x, keep)
    assert latent.shape == (4, 2 + 4, 16)
    noise = torch.randn(x.shape, generator=generator)
    assert torch.equal(mae.encode(torch.where(hidden == 1, noise, x), keep), latent)
    assert not torch.isclose(mae.encode(torch.where(hidden == 0, noise, x), keep), latent).any(dim=-1).all()


def test_encoding_all_patches_is_the_encoder(mae: MAE, generator: Generator) -> None:
    x = torch.randn(3, 3, 16, 16, generator=generator)
    everything = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(mae.encode(x, everything), mae.encoder(x), atol=1e-6, rtol=0)
    turned = everything.flip(1)  # order of the patches plays no part
    expected = torch.cat([mae.encoder(x)[:, :2], mae.encoder(x)[:, 2:].flip(1)], dim=1)
    torch.testing.assert_close(mae.encode(x, turned), expected, atol=1e-5, rtol=0)


def test_the_decoder_sees_each_visible_token_in_its_place(mae: MAE, generator: Generator) -> None:
    """Against the forward pass written out for one image, patch by patch."""
    keep, restore, mask = masking(3, 16, 0.75, generator)
    latent = torch.randn(3, 2 + 4, 16, generator=generator)
    positions = sincos_positions(16, 4)
    for n in range(3):
        tokens = [mae.decoder_embed(latent[n, i]) for i in range(2)]
        for patch in range(16):
            if mask[n, patch]:
                token = mae.mask_token[0, 0]
            else:
                token = mae.decoder_embed(latent[n, 2 + keep[n].tolist().index(patch)])
            tokens.append(token + positions[patch])
        y = mae.decoder_pred(mae.decoder_norm(mae.decoder_blocks(torch.stack(tokens)[None])))[0, 2:]
        torch.testing.assert_close(mae.decode(latent, restore)[n], y, atol=1e-5, rtol=1e-5)


def test_positions_are_fixed(mae: MAE) -> None:
    encoder = mae.encoder
    assert not encoder.pos_embed.requires_grad
    assert torch.equal(encoder.pos_embed[0, :2], torch.zeros(2, 16))
    assert torch.equal(encoder.pos_embed[0, 2:], sincos_positions(16, 4))


@pytest.mark.parametrize(("change", "named"), [({"stem": "conv"}, "patch stem"), ({"no_embed_class": True}, "CLS")])
def test_encoders_it_cannot_use_are_refused(
    change: dict[str, object], named: str, settings: Callable[..., MAESettings]
) -> None:
    with pytest.raises(ValueError, match=named):
        MAE(ViT(ViTConfig(16, 4, 16, 1, 2, **change)), settings("mae"))  # type: ignore[arg-type]


def test_the_loss_is_that_of_its_steps(mae: MAE, views: Callable[..., list[Tensor]]) -> None:
    x, noise = seen = views(mae)
    assert noise.shape == (20, 16)
    loss, _ = mae.loss(seen)
    keep, restore, mask = random_masking(noise, 0.75)
    pred = mae.decode(mae.encode(x, keep), restore)
    assert torch.equal(loss, masked_pixel_loss(pred, patchify(x, 4), mask, True))


@pytest.mark.parametrize("normalize_pixels", [True, False])
def test_the_loss_is_that_of_lightlys_parts(
    normalize_pixels: bool, mae: MAE, views: Callable[..., list[Tensor]]
) -> None:
    """As lightly's own MAE example goes: patches, those at the hidden places, normalized, mean squared error."""
    mae.normalize_pixels = normalize_pixels
    x, noise = seen = views(mae)
    keep, restore, mask = random_masking(noise, 0.75)
    hidden = mask.bool().nonzero()[:, 1].view(20, 12)
    target = lightly.get_at_index(lightly.patchify(x, 4), hidden)
    if normalize_pixels:
        target = lightly.normalize_mean_var(target)
    pred = lightly.get_at_index(mae.decode(mae.encode(x, keep), restore), hidden)
    expected = torch.nn.MSELoss()(pred, target)
    torch.testing.assert_close(mae.loss(seen)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_patches_are_those_of_lightly_and_go_back(p: int, generator: Generator) -> None:
    x = torch.randn(3, 3, 16, 16, generator=generator)
    assert torch.equal(patchify(x, p), lightly.patchify(x, p))
    assert torch.equal(unpatchify(patchify(x, p), p), x)
    assert torch.equal(lightly.unpatchify(patchify(x, p), p), x)


def test_tokens_are_taken_as_in_lightly(generator: Generator) -> None:
    x = torch.randn(3, 16, 8, generator=generator)
    keep, _, _ = masking(3, 16, 0.75, generator)
    assert torch.equal(take(x, keep), lightly.get_at_index(x, keep))


@pytest.mark.parametrize(("width", "grid"), [(16, 4), (64, 7)])
def test_positions_are_those_of_lightly(width: int, grid: int) -> None:
    expected = torch.from_numpy(lightly.get_2d_sine_cosine_positional_embedding(width, grid, cls_token=False)).float()
    torch.testing.assert_close(sincos_positions(width, grid), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("normalize_pixels", [True, False])
def test_reconstructions_keep_what_is_visible(
    normalize_pixels: bool, mae: MAE, views: Callable[..., list[Tensor]]
) -> None:
    mae.normalize_pixels = normalize_pixels
    x, noise = seen = views(mae)
    picture, masked, original = mae.reconstruct(seen), mae.masked(seen), denormalize(x)
    hidden = random_masking(noise, 0.75)[2].view(20, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3) == 1
    for found in (picture, masked):
        assert found.shape == x.shape
        assert found.min() >= 0
        assert found.max() <= 1
        torch.testing.assert_close(torch.where(hidden, 0, found), torch.where(hidden, 0, original), atol=1e-6, rtol=0)
    assert (masked[hidden.expand_as(masked)] == 0.5).all()
    assert (picture - original).abs()[hidden.expand_as(picture)].mean() > 0.01
    assert not picture.requires_grad


@pytest.mark.parametrize("normalize_pixels", [True, False])
def test_a_perfect_prediction_is_the_picture(
    normalize_pixels: bool, mae: MAE, views: Callable[..., list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What costs nothing must look like the original: the loss and the pictures mean the same targets."""
    mae.normalize_pixels = normalize_pixels
    x, _ = seen = views(mae)
    target = patchify(x, 4)
    if normalize_pixels:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    monkeypatch.setattr(mae, "decode", lambda *_: target)
    assert mae.loss(seen)[0] < 1e-9
    torch.testing.assert_close(mae.reconstruct(seen), denormalize(x), atol=1e-5, rtol=0)


def test_learns_from_real_photos(
    learn: Callable[..., tuple[Objective, list[dict[str, float]]]], photos: Images,
    views: Callable[..., list[Tensor]],
) -> None:  # fmt: skip
    def judge(steps: int) -> float:
        mae, _ = learn(
            "mae", photos.pixels, steps, width=48, depth=2, decoder_width=32, epochs=10, batch_size=100, lr=3e-3
        )
        with torch.no_grad():
            return mae.loss(views(mae, 9, photos.pixels))[0].item()

    assert judge(20) < 0.98 < 1.2 < judge(0)  # 1 is what the patch's mean alone gives
