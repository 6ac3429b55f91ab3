import pytest
import torch
from torch import Generator, nn

from patchsight_train.architecture import EncoderConfig, ResNetConfig, ViTConfig
from patchsight_train.build import build_encoder
from patchsight_train.encoder import chunks, copy_into, default_pooling, pool

CONFIGS: list[EncoderConfig] = [
    ViTConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2),
    ViTConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2, registers=3),
    ResNetConfig(image_size=32),
    ResNetConfig(image_size=64, stem="imagenet"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_backbone_has_one_layout_of_tokens(config: EncoderConfig, generator: Generator) -> None:
    """Prefix, then patches row by row, as many as the configuration says; and the embeddings made of them."""
    encoder = build_encoder(config).eval()
    x = torch.randn(2, 3, config.image_size, config.image_size, generator=generator)
    with torch.no_grad():
        tokens = encoder(x)
        assert tokens.shape == (2, config.prefix_tokens + config.grid**2, config.width)
        assert encoder.config == config
        patches = tokens[:, config.prefix_tokens :]
        mean = torch.stack([sum(patches[n, i] for i in range(config.grid**2)) / config.grid**2 for n in range(2)])
        torch.testing.assert_close(encoder.pooled(x, "mean"), mean, atol=1e-5, rtol=1e-5)
        if config.prefix_tokens:
            assert torch.equal(encoder.pooled(x, "cls"), tokens[:, 0])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_embedding_that_is_kept_does_not_keep_all_tokens(pooling: str) -> None:
    """It did: 20,000 embeddings of pictures of 257 tokens held 4 GB."""
    tokens = torch.randn(3, 17, 8)
    assert pool(tokens, 1, pooling).untyped_storage().nbytes() == 3 * 8 * 4


def test_registers_are_in_no_embedding(generator: Generator) -> None:
    tokens = torch.randn(2, 1 + 3 + 16, 8, generator=generator)
    changed = tokens.clone()
    changed[:, 1:4] = 100
    for pooling in ("cls", "mean"):
        assert torch.equal(pool(tokens, 4, pooling), pool(changed, 4, pooling))
    assert not torch.equal(pool(tokens, 1, "mean"), pool(changed, 1, "mean"))


def test_cls_is_recommended_where_there_is_one() -> None:
    assert [default_pooling(config) for config in CONFIGS] == ["cls", "cls", "mean", "mean"]


@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [
        (7, 3, [(0, 3), (3, 6), (6, 7)]),
        (6, 3, [(0, 3), (3, 6)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
        (5, 9, [(0, 5)]),
        (5, None, [(0, 5)]),
        (0, None, []),
        (0, 4, []),
    ],
)
def test_chunks_cover_everything_once(n: int, size: int | None, expected: list[tuple[int, int]]) -> None:
    assert [(part.start, part.stop) for part in chunks(n, size)] == expected


def test_a_copy_has_parameters_and_buffers_and_is_no_alias() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    source, target = network(), network()
    source(torch.randn(8, 3))
    copy_into(target, source)
    for (name, a), (_, b) in zip(source.state_dict().items(), target.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(target.get_buffer("1.running_mean"), torch.zeros(3))
    with torch.no_grad():
        source.get_parameter("0.weight").add_(1)
    assert not torch.equal(source.get_parameter("0.weight"), target.get_parameter("0.weight"))
