"""An encoder without weights, for tests and for trying the server out: instant, and the same on every machine."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from patchsight_serve.encoder import Pixels, Runtime, Values
from patchsight_serve.manifest import Manifest, Transform

Numbers = np.ndarray[Any, np.dtype[Any]]


class FakeEncoder:
    """Outputs are functions of the pixels: equal images have equal embeddings, different ones differ.

    All arithmetic is on integers until the last step, so an image's numbers do not depend on its batch. Without a
    patch size it is what a ResNet's bundle is: `mean_embedding` and nothing else.
    """

    def __init__(
        self, name: str = "fake", image_size: int = 32, patch_size: int | None = 4, embedding_dim: int = 16,
        num_heads: int = 2, both: bool = False, dynamic_size: bool = False,
    ) -> None:  # fmt: skip
        self.manifest = Manifest(
            name=name,
            sha256=hashlib.sha256(f"{name} {image_size} {patch_size} {embedding_dim} {num_heads}".encode()).hexdigest(),
            objective="none",
            architecture="fake",
            parameters=1,
            image_size=image_size,
            patch_size=patch_size,
            embedding_dim=embedding_dim,
            num_heads=num_heads if patch_size else None,
            prefix_tokens=1 if patch_size else 0,
            recommended="both" if both else "cls" if patch_size else "mean",
            transform=Transform(resize=image_size, crop=image_size),
            data="none",
            recipe="none",
            commit="none",
            license="Apache-2.0",
            dynamic_size=dynamic_size,
        )
        self.runtime = Runtime("fake", "fp32")
        # Odd, hence never 0: changing one pixel by one changes every component.
        rng = np.random.default_rng(0)
        self._weights = 2 * rng.integers(-4, 4, (image_size * image_size * 3, embedding_dim)) + 1

    def run(self, images: Pixels, outputs: Sequence[str]) -> dict[str, Values]:
        """As in `Encoder`."""
        return {name: getattr(self, f"_{name}")(images).astype(np.float32) for name in outputs}

    def _cls_embedding(self, images: Pixels) -> Numbers:
        flat = images.reshape(len(images), -1).astype(np.int64)
        values: Numbers = flat @ np.resize(self._weights, (flat.shape[1], self.manifest.embedding_dim))
        return values

    def _mean_embedding(self, images: Pixels) -> Numbers:
        mean: Numbers = self._patch_tokens(images).mean(axis=(1, 2))
        return mean

    def _both_embedding(self, images: Pixels) -> Numbers:
        return np.concatenate([self._cls_embedding(images), self._mean_embedding(images)], axis=1)

    def _attention(self, images: Pixels) -> Numbers:
        """Each head looks at the bright patches, more sharply than the head before; the CLS token keeps 0.1."""
        brightness = self._patches(images).sum(axis=3)  # (N, h, w), whole numbers
        power = np.arange(1, (self.manifest.num_heads or 1) + 1)[None, :, None, None]
        brightest = brightness.max(axis=(1, 2), keepdims=True, initial=1)
        weight = (1.0 + (brightness / brightest)[:, None]) ** power
        share: Numbers = 0.9 * weight / weight.sum(axis=(2, 3), keepdims=True)
        return share

    def _patch_tokens(self, images: Pixels) -> Numbers:
        patches = self._patches(images)
        tokens: Numbers = patches @ self._weights[: patches.shape[3]]
        return tokens

    def _patches(self, images: Pixels) -> Numbers:
        """`(N, H, W, 3)` to int64 `(N, h, w, p * p * 3)`."""
        N, H, W, C = images.shape
        p = self.manifest.patch_size or H
        grid = images.reshape(N, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5)
        return grid.reshape(N, H // p, W // p, p * p * C).astype(np.int64)
