"""k-NN while training: how good are the embeddings right now? DINO's protocol (arXiv:2104.14294, section 4.1).

The server's `patchsight_serve.protocol` says the same in FAISS and numpy, for millions; a test holds the two equal.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_train.data import EncodedImages, Images, decode_all, draw
from patchsight_train.encoder import Encoder
from patchsight_train.views import eval_view

Side = tuple[EncodedImages, Tensor]  # images, and which of them: int64 (n,)


@dataclass(frozen=True)
class Probe:
    """Labelled images to judge by: `gallery` is searched, `queries` are classified. Pixels uint8 `(N, 3, S, S)`."""

    gallery: Images
    queries: Images

    def accuracy(self, encoder: Encoder, pooling: str, device: torch.device, k: int = 20) -> float:
        """Share of the queries, 0..1, that the k nearest gallery images classify rightly."""
        assert self.gallery.labels is not None
        assert self.queries.labels is not None
        gallery = embed(encoder, self.gallery.pixels, pooling, device)
        queries = embed(encoder, self.queries.pixels, pooling, device)
        predicted = knn_predict(gallery, self.gallery.labels, queries, min(k, len(gallery)))
        return (predicted == self.queries.labels).float().mean().item()


def load_probe(
    sources: Iterable[str], knn_test: Sequence[str], image_size: int, most_gallery: int, most_queries: int,
    console: Console, limit: int | None = None,
) -> Probe | None:  # fmt: skip
    """Decode what the probe needs and no more, at the eval transform; None where nothing is labelled.

    Where there are more images than asked for, a random subset is taken, always the same one. `limit` holds for
    `sources`, as in training.

    Raises:
        InvalidRequest: a source is missing, none of its images can be read, or the two sides have different classes.
        DataLost: as `load_images`.
    """
    split = split_probe(EncodedImages(sources, limit), EncodedImages(knn_test) if knn_test else None)
    if split is None:
        return None
    (gallery, gallery_rows), (queries, query_rows) = split
    return Probe(
        decode_all(gallery, draw(gallery_rows, most_gallery).tolist(), image_size, console),
        decode_all(queries, draw(query_rows, most_queries).tolist(), image_size, console),
    )


def split_probe(train: EncodedImages, test: EncodedImages | None) -> tuple[Side, Side] | None:
    """Gallery and queries. Queries are the test images, or every tenth labelled one where only one set has labels.

    None where neither has, or so few that no tenth is there.

    Raises:
        InvalidRequest: the two sets have different classes.
    """
    labelled = [
        (images, (images.labels >= 0).nonzero().squeeze(1))
        for images in (train, test)
        if images is not None and images.labels is not None
    ]
    if len(labelled) == 2:
        ours, theirs = (images.class_names for images, _ in labelled)
        if ours != theirs:
            raise InvalidRequest(f"--knn-test has the classes {theirs}, --data has {ours}")
        return labelled[0], labelled[1]
    if not labelled or len(labelled[0][1]) < 10:
        return None
    images, rows = labelled[0]
    tenth = torch.arange(len(rows)) % 10 == 9
    return (images, rows[~tenth]), (images, rows[tenth])


@torch.no_grad()
def embed(encoder: Encoder, pixels: Tensor, pooling: str, device: torch.device, batch: int = 512) -> Tensor:
    """uint8 `(N, 3, S, S)` to L2-normalized float32 `(N, D)` on the CPU. `pooling`: "cls", or "mean" of the patches."""
    was_training = encoder.training
    encoder.eval()
    parts = []
    for chunk in torch.split(pixels, batch):
        pooled = encoder.pooled(eval_view(chunk.to(device)), pooling)
        parts.append(F.normalize(pooled.float(), dim=1).cpu())
    encoder.train(was_training)
    return torch.cat(parts)


def knn_predict(gallery: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float = 0.07) -> Tensor:
    """Classes int64 `(Q,)`: each of the k most similar votes exp(similarity / temperature), ties by the lower class."""
    classes = int(labels.max()) + 1
    predicted = []
    for chunk in torch.split(queries, 1024):
        # A stable sort, not topk: equal similarities go by row.
        similarity, index = (x[:, :k] for x in (chunk @ gallery.T).sort(dim=1, descending=True, stable=True))
        votes = torch.zeros(len(chunk), classes).scatter_add_(1, labels[index], (similarity / temperature).exp())
        predicted.append(votes.argmax(dim=1))
    return torch.cat(predicted)
