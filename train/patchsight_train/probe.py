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
from patchsight_train.views import eval_view
from patchsight_train.vit import ViT


@dataclass(frozen=True)
class Probe:
    """Labelled images to judge by: `gallery` is searched, `queries` are classified. Pixels uint8 `(N, 3, S, S)`."""

    gallery: Images
    queries: Images

    def accuracy(self, encoder: ViT, pooling: str, device: torch.device, k: int = 20) -> float:
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
    """Decode what the probe needs and no more, at the eval transform. None where nothing is labelled.

    Queries are the images of `knn_test`, or every tenth labelled one where only one side has labels. Where there are
    more than asked for, a random subset is taken, always the same one. `limit` holds for `sources`, as in training.

    Raises:
        InvalidRequest: a source is missing, none of its images can be read, or the two sides have different classes.
    """
    train = EncodedImages(sources, limit)
    test = EncodedImages(knn_test) if knn_test else None
    labelled = [images for images in (train, test) if images is not None and images.labels is not None]
    if len(labelled) == 2:
        gallery, queries = labelled
        if gallery.class_names != queries.class_names:
            raise InvalidRequest(f"--knn-test has the classes {queries.class_names}, --data has {gallery.class_names}")
        rows = _labelled_rows(gallery), _labelled_rows(queries)
    elif labelled and len(_labelled_rows(labelled[0])) >= 10:
        (gallery,) = (queries,) = labelled
        both = _labelled_rows(gallery)
        tenth = torch.arange(len(both)) % 10 == 9
        rows = both[~tenth], both[tenth]
    else:
        return None
    chosen = draw(rows[0], most_gallery).tolist(), draw(rows[1], most_queries).tolist()
    return Probe(
        decode_all(gallery, chosen[0], image_size, console), decode_all(queries, chosen[1], image_size, console)
    )


def _labelled_rows(images: EncodedImages) -> Tensor:
    assert images.labels is not None
    return (images.labels >= 0).nonzero().squeeze(1)


def split_probe(train: Images, test: Images | None, most_gallery: int, most_queries: int) -> Probe | None:
    """Queries are the test images, or every tenth where only one of the sets has labels; None where neither has.

    Raises:
        InvalidRequest: the two sets have different classes.
    """
    labelled = [images for images in (train, test) if images is not None and images.labels is not None]
    if len(labelled) == 2:
        gallery, queries = labelled
        if gallery.class_names != queries.class_names:
            raise InvalidRequest(f"--knn-test has the classes {queries.class_names}, --data has {gallery.class_names}")
    elif labelled and len(labelled[0]) >= 10:
        tenth = torch.arange(len(labelled[0])) % 10 == 9
        gallery, queries = _select(labelled[0], ~tenth), _select(labelled[0], tenth)
    else:
        return None
    return Probe(_select(gallery, slice(most_gallery)), _select(queries, slice(most_queries)))


def _select(images: Images, chosen: Tensor | slice) -> Images:
    assert images.labels is not None
    return Images(images.pixels[chosen], images.labels[chosen], images.class_names)


@torch.no_grad()
def embed(encoder: ViT, pixels: Tensor, pooling: str, device: torch.device, batch: int = 512) -> Tensor:
    """uint8 `(N, 3, S, S)` to L2-normalized float32 `(N, D)` on the CPU. `pooling`: "cls", or "mean" of the patches."""
    was_training = encoder.training
    encoder.eval()
    P = encoder.config.prefix_tokens
    parts = []
    for chunk in torch.split(pixels, batch):
        tokens = encoder(eval_view(chunk.to(device)))
        pooled = tokens[:, 0] if pooling == "cls" else tokens[:, P:].mean(dim=1)
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
