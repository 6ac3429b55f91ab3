"""All that a frozen encoder says of labelled images: its embeddings, of each kind, computed once for every measure.

Kinds: "cls" and "mean" (of the patch tokens) of the last layer; "both" side by side; and "last 4 blocks", the CLS
tokens of the last four blocks side by side, each through the final norm, as DINO's linear evaluation takes them
(arXiv:2104.14294, App. F.2). A ResNet has "mean" alone. Where a bundle whitens its embeddings, the first three are
those that it serves.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsight_serve.dataset import Dataset
from patchsight_serve.decode import decode
from patchsight_serve.embedder import batches
from patchsight_serve.errors import PatchsightError
from patchsight_serve.item import Identity
from patchsight_serve.labelled import embed_rows
from patchsight_serve.nearest import F32
from patchsight_train.data import decoders, eval_transform, look_ahead
from patchsight_train.encoder import Encoder, pool, side_by_side
from patchsight_train.views import eval_view
from patchsight_train.vit import ViT
from patchsight_train.whitening import Whitening

LAST = 4  # blocks
BATCH = 128  # images


@dataclass(frozen=True)
class Features:
    """The images of one side that could be read. rows: their places in the data set, int64 `(N,)`. labels: int64
    `(N,)`, 0 or more. kinds: float32 `(N, ·)` each, on the CPU, not normalized. skipped: name and reason of each other
    image."""

    names: list[str]
    rows: Tensor
    labels: Tensor
    kinds: dict[str, Tensor]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.names)


@torch.no_grad()
def features(encoder: Encoder, pixels: Tensor, whitening: Mapping[str, Whitening]) -> dict[str, Tensor]:
    """uint8 `(N, 3, S, S)` on the encoder's device to each kind, float32 `(N, ·)` on the CPU. whitening: what those go
    through that a bundle whitens."""
    kinds = {name: value.float().cpu() for name, value in _kinds(encoder, eval_view(pixels)).items()}
    return {name: whitening[name](value) if name in whitening else value for name, value in kinds.items()}


def _kinds(encoder: Encoder, x: Tensor) -> dict[str, Tensor]:
    """As the encoder gives them."""
    if not isinstance(encoder, ViT):
        return {"mean": encoder.pooled(x, "mean")}
    P = encoder.config.prefix_tokens
    tokens, cls = encoder.embed(x), []
    for block in encoder.blocks:
        tokens = block(tokens)
        cls.append(encoder.norm(tokens)[:, 0])
    tokens, last = encoder.norm(tokens), cls[-LAST:]
    by_cls, by_mean = pool(tokens, P, "cls"), pool(tokens, P, "mean")
    return {
        "cls": by_cls, "mean": by_mean, "both": side_by_side(by_cls, by_mean),
        f"last {len(last)} blocks": torch.cat(last, dim=1),
    }  # fmt: skip


class TorchEmbedder:
    """An encoder of torch as the `Embedder` that `embed_rows` asks: every kind of an image in one vector, `split`
    afterwards. The next batches are decoded while one is encoded."""

    def __init__(self, encoder: Encoder, name: str, device: torch.device, whitening: Mapping[str, Whitening]) -> None:
        self.encoder, self.output = Identity(name, ""), "every kind"
        self._module, self._device, self._whitening = encoder.to(device).eval(), device, whitening
        self._transform = eval_transform(encoder.config.image_size)
        self._widths: dict[str, int] = {}

    def embed_each(self, images: Iterable[bytes]) -> Iterator[F32 | PatchsightError]:
        """As in `Embedder`."""

        def read(data: bytes) -> np.ndarray | PatchsightError:
            try:
                return decode(data, self._transform)
            except PatchsightError as error:
                return error

        with decoders() as pool_:
            started = look_ahead(batches(images, BATCH), lambda batch: [pool_.submit(read, data) for data in batch], 1)
            for futures in started:
                decoded = [future.result() for future in futures]
                vectors = iter(self._encode([p for p in decoded if not isinstance(p, PatchsightError)]))
                yield from (entry if isinstance(entry, PatchsightError) else next(vectors) for entry in decoded)

    def _encode(self, images: list[np.ndarray]) -> F32:
        if not images:
            return np.empty((0, 0), np.float32)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self._device)
        kinds = features(self._module, pixels, self._whitening)
        self._widths = {name: value.shape[1] for name, value in kinds.items()}
        packed: F32 = torch.cat(list(kinds.values()), dim=1).numpy()
        return packed

    def split(self, packed: Tensor) -> dict[str, Tensor]:
        """`(N, ·)` as `embed_each` gave them, by kind."""
        return dict(zip(self._widths, torch.split(packed, list(self._widths.values()), dim=1), strict=True))


def embed_side(dataset: Dataset, embedder: TorchEmbedder, advance: Callable[[], None] = lambda: None) -> Features:
    """Every kind of embedding of all images of a labelled data set. advance: called after each image.

    Raises:
        InvalidRequest: none can be read.
        PatchsightError: an embedding is not finite, or has length 0; the image is named.
    """
    assert dataset.labels is not None
    rows, vectors, skipped = embed_rows(dataset, embedder, advance)
    kinds = embedder.split(torch.from_numpy(vectors))
    for kind, z in kinds.items():
        empty = (z == 0).all(dim=1).nonzero()
        if len(empty):
            raise PatchsightError(f"the embedding of {dataset.names[rows[int(empty[0])]]} ({kind}) has length 0")
    labels = torch.from_numpy(dataset.labels[rows])
    return Features([dataset.names[i] for i in rows], torch.tensor(rows), labels, kinds, skipped)
