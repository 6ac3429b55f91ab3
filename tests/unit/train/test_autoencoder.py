from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchsight_train.autoencoder import Autoencoder, psnr
from patchsight_train.data import Images
from patchsight_train.mae import unpatchify
from patchsight_train.objective import Objective
from patchsight_train.views import denormalize
from patchsight_train.vit import sincos_positions

Make = Callable[..., Objective]
Views = Callable[..., list[Tensor]]
BACKBONES = [
    {},
    {"registers": 2},
    {"stem": "conv"},
    {"image_size": 24, "patch_size": 8, "decoder_depth": 2},
    {"backbone": "resnet18", "width": None, "depth": None, "heads": None},
    {"backbone": "resnet18", "width": None, "depth": None, "heads": None, "image_size": 20},
]


@pytest.mark.parametrize("choices", BACKBONES)
def test_loss_is_the_squared_error_of_the_pictures(choices: dict[str, object], objective: Make, views: Views) -> None:
    model = cast(Autoencoder, objective("autoencoder", **choices)).eval()
    (x,) = views(model)
    loss, _ = model.loss([x])
    z = model.code(x)
    assert z.shape == (20, 8)
    picture = unpatchify(model.decoder(z), model.decoder.patch_size)
    assert picture.shape == x.shape
    torch.testing.assert_close(loss, F.mse_loss(picture, x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.reconstruct([x]), denormalize(picture), atol=1e-6, rtol=0)


def test_decoder_against_the_forward_pass_written_out(objective: Make, views: Views) -> None:
    """One image, patch by patch; and z is a linear map of all tokens."""
    model = cast(Autoencoder, objective("autoencoder", decoder_depth=2))
    decoder, positions = model.decoder, sincos_positions(16, 4)
    (x,) = views(model)
    z = model.to_code.weight @ torch.cat(list(model.encoder(x)[3])) + model.to_code.bias
    weight, bias = decoder.embed.weight.view(16, 16, 8), decoder.embed.bias.view(16, 16)  # patch, width, z
    tokens = torch.stack([weight[patch] @ z + bias[patch] + positions[patch] for patch in range(16)])[None]
    for block in decoder.blocks:
        tokens = block(tokens)
    expected = decoder.pixels(decoder.norm(tokens))[0]
    torch.testing.assert_close(model.predict(x)[3], expected, atol=1e-5, rtol=1e-5)


def jacobian_rank(model: Autoencoder, x: Tensor) -> int:
    """How many numbers of one picture `(1, 3, S, S)` get to its reconstruction, to first order."""
    model.double()
    J = torch.autograd.functional.jacobian(lambda v: model.predict(v).flatten(), x.double())
    return int(torch.linalg.matrix_rank(J.flatten(1), rtol=1e-9))


@pytest.mark.parametrize("Z", [1, 5])
def test_no_more_numbers_than_the_bottleneck_has_get_through(Z: int, objective: Make, views: Views) -> None:
    model = cast(Autoencoder, objective("autoencoder", bottleneck=Z, image_size=8))
    assert jacobian_rank(model, views(model)[0][:1]) == Z


def test_the_decoder_sees_z_alone(objective: Make, views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cast(Autoencoder, objective("autoencoder"))
    first, second = views(model, 1)[0], views(model, 2)[0]
    assert not torch.equal(model.predict(first), model.predict(second))
    z = model.code(first)
    monkeypatch.setattr(model, "code", lambda _: z)
    assert torch.equal(model.predict(first), model.predict(second))


def test_views_are_crops_of_the_asked_scale(objective: Make, views: Views) -> None:
    whole = cast(Autoencoder, objective("autoencoder", crop_scale=(1.0, 1.0)))
    part = cast(Autoencoder, objective("autoencoder", crop_scale=(0.2, 0.3)))
    assert whole.view.scale == (1.0, 1.0)
    assert part.view.scale == (0.2, 0.3)
    (x,) = views(part)
    assert x.shape == (20, 3, 16, 16)
    assert torch.equal(x, views(part)[0])
    assert not torch.equal(x, views(part, 1)[0])


def test_micro_batches_change_no_number(
    objective: Make, views: Views, backward: Callable[..., dict[str, Tensor]]
) -> None:
    whole, parts = objective("autoencoder"), objective("autoencoder", micro_batch=7)
    a, b = backward(whole, views(whole)), backward(parts, views(parts))
    assert a.keys() == b.keys() == {"loss", "psnr"}
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-6)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_half_precision_changes_the_loss_little(objective: Make, views: Views) -> None:
    model = objective("autoencoder")
    x = views(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, metrics = model.loss(x)
        picture = model.reconstruct(x)
    assert loss.dtype == metrics["psnr"].dtype == torch.float32
    assert picture is not None
    assert picture.dtype == torch.float32
    torch.testing.assert_close(loss, model.loss(x)[0], atol=0.02, rtol=0)


def test_psnr_against_its_definition() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 3, 4, 4, generator=rng)
    b[2] = a[2]
    peaks = [20 * torch.log10(1 / ((a[i] - b[i]) ** 2).mean().sqrt()) for i in range(2)]
    torch.testing.assert_close(psnr(a, b), (peaks[0] + peaks[1] + 100) / 3)


def test_learns_to_reconstruct_photos(
    photos: Images, learn: Callable[..., tuple[Objective, list[dict[str, float]]]]
) -> None:
    _, metrics = learn(
        "autoencoder", photos.pixels, 25, image_size=16, width=32, depth=2, bottleneck=32, decoder_width=32,
        decoder_depth=2, epochs=20, batch_size=50, lr=3e-3, warmup_epochs=0, crop_scale=(0.8, 1.0),
    )  # fmt: skip
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert metrics[-1]["psnr"] > metrics[0]["psnr"] + 2
