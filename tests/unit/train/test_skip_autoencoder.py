from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

from patchsight_train.data import Images
from patchsight_train.objective import Objective
from patchsight_train.skip_autoencoder import SkipAutoencoder, mirrored
from patchsight_train.vit import sincos_positions

Make = Callable[..., Objective]
Views = Callable[..., list[Tensor]]


@pytest.mark.parametrize(
    ("layers", "blocks", "order"),
    [(4, 4, [3, 2, 1, 0]), (12, 4, [11, 7, 3, 0]), (1, 2, [0, 0]), (2, 4, [1, 0, 0, 0]), (5, 1, [0]), (3, 2, [2, 0])],
)
def test_last_layers_are_seen_first(layers: int, blocks: int, order: list[int]) -> None:
    assert mirrored(layers, blocks) == order


@pytest.mark.parametrize("registers", [0, 2])
def test_forward_pass_written_out(registers: int, objective: Make, views: Views) -> None:
    model = cast(SkipAutoencoder, objective("skip_autoencoder", depth=3, decoder_depth=2, registers=registers))
    (x,) = views(model)
    encoder, decoder, P = model.encoder, model.decoder, 1 + registers
    first = encoder.blocks[0](encoder.embed(x))
    last = encoder.blocks[2](encoder.blocks[1](first))
    torch.testing.assert_close(encoder.norm(last), encoder(x))
    tokens = decoder.embed(model.code(x)).view(20, 16, 16) + sincos_positions(16, 4)
    for layer, i in ((last, 0), (first, 1)):
        joined = decoder.joints[i](torch.cat([tokens, layer[:, P:]], dim=2))
        tokens = decoder.blocks[i](joined)
    torch.testing.assert_close(model.predict(x), decoder.pixels(decoder.norm(tokens)), atol=1e-5, rtol=1e-5)


def test_the_decoder_sees_more_than_z(objective: Make, views: Views) -> None:
    """Where z is held at 0, the reconstruction still depends on the picture."""
    model = cast(SkipAutoencoder, objective("skip_autoencoder"))
    with torch.no_grad():
        model.to_code.weight.zero_()
        model.to_code.bias.zero_()
    first, second = views(model, 1)[0], views(model, 2)[0]
    assert torch.equal(model.code(first), model.code(second))
    changed = (model.predict(first) != model.predict(second)).any(dim=2)
    assert changed.all()  # at every patch


def test_every_layer_gets_a_gradient_past_z(objective: Make, views: Views) -> None:
    model = cast(SkipAutoencoder, objective("skip_autoencoder", depth=2, decoder_depth=2))
    with torch.no_grad():
        model.decoder.embed.weight.zero_()  # the way through z is cut
    model.loss(views(model))[0].backward()  # type: ignore[no-untyped-call]
    assert all(block.mlp.fc2.weight.grad.abs().sum() > 0 for block in model.encoder.blocks)
    assert (model.to_code.weight.grad == 0).all()


def test_micro_batches_and_recomputation_change_no_number(
    objective: Make, views: Views, backward: Callable[..., dict[str, Tensor]]
) -> None:
    whole, parts = objective("skip_autoencoder", depth=2), objective("skip_autoencoder", depth=2, micro_batch=7)
    again = cast(SkipAutoencoder, objective("skip_autoencoder", depth=2))
    again.encoder.recompute = True
    a, b, c = (backward(model, views(model)) for model in (whole, parts, again))
    torch.testing.assert_close(a["loss"], b["loss"], atol=1e-6, rtol=0)
    assert torch.equal(a["loss"], c["loss"])
    for (name, p), q, r in zip(whole.named_parameters(), parts.parameters(), again.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)
        assert torch.equal(p.grad, r.grad), name


def test_recomputation_keeps_no_activations_of_the_blocks(objective: Make, views: Views) -> None:
    def saved(recompute: bool) -> int:
        model = cast(SkipAutoencoder, objective("skip_autoencoder", depth=4))
        model.encoder.recompute = recompute
        count = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal count
            count += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.loss(views(model))
        return count

    assert saved(True) < 0.5 * saved(False)


def test_resnets_are_refused(objective: Make) -> None:
    with pytest.raises(ValueError, match="skip_autoencoder needs a Vision Transformer, not resnet18"):
        objective("skip_autoencoder", backbone="resnet18", width=None, depth=None, heads=None)


def test_shortcuts_make_reconstruction_easy(
    photos: Images, learn: Callable[..., tuple[Objective, list[dict[str, float]]]]
) -> None:
    """Same encoder, decoder, photos and steps: through 32 numbers, and with shortcuts beside them."""
    choices = {
        "image_size": 16, "width": 32, "depth": 2, "bottleneck": 32, "decoder_width": 32, "decoder_depth": 2,
        "epochs": 20, "batch_size": 50, "lr": 3e-3, "warmup_epochs": 0, "crop_scale": (0.8, 1.0),
    }  # fmt: skip
    _, through = learn("autoencoder", photos.pixels, 25, **choices)
    _, past = learn("skip_autoencoder", photos.pixels, 25, **choices)
    assert past[-1]["loss"] < 0.7 * through[-1]["loss"]
