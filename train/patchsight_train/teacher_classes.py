"""Classes for a teacher that has none: a linear classifier on its embeddings of some labelled images.

Deterministic: nothing is drawn but which images, and those are always the same. Letters: n labelled images, K classes,
D_t teacher's width.
"""

from collections.abc import Sequence

import torch
from rich.console import Console
from torch import Tensor

from patchsight_serve.decode import decode
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.manifest import Transform
from patchsight_train.data import EncodedImages, Pixels, decode_all, draw
from patchsight_train.encoder import chunks
from patchsight_train.linear import logistic_regression
from patchsight_train.teacher import Teacher

MOST = 10_000  # labelled images: a linear classifier needs no more
BATCH = 2_048  # of them in memory at once


def learn_classes(
    teacher: Teacher, sources: Sequence[str], limit: int | None, console: Console
) -> tuple[Tensor, Tensor]:
    """W `(K, D_t)` and b `(K,)`, float32: an embedding e has the logits W e + b. K counts the classes that occur.

    sources, limit: labelled images as `EncodedImages` takes them; those without a label play no part.

    Raises:
        InvalidRequest: there is no labelled image, or all are of one class.
        DataLost: the files cannot be read any more.
    """
    embeddings, labels = _labelled_embeddings(teacher, sources, limit, console)
    classes, y = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise InvalidRequest(f"{', '.join(sources)}: all labelled images are of one class; soft targets need 2 or more")
    x = embeddings.double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
    deviation = deviation.clamp(min=1e-6 * float(x.abs().max()))  # a constant channel must not be blown up
    W, b = logistic_regression((x - mean) / deviation, y, len(classes), 1 / len(x))
    W = W / deviation  # of the embedding as it is
    learned = f"{teacher.manifest.name} learned {len(classes)} classes from {len(x):,} labelled images"
    console.print(learned, soft_wrap=True, highlight=False, markup=False)
    return W.float(), (b - W @ mean).float()


def _labelled_embeddings(
    teacher: Teacher, sources: Sequence[str], limit: int | None, console: Console
) -> tuple[Tensor, Tensor]:
    """float32 `(n, D_t)` and int64 `(n,)`."""
    encoded = _AsTaught(sources, limit, teacher.manifest.transform)
    if encoded.labels is None:
        raise InvalidRequest(
            f"{', '.join(sources)}: no labels, or not the same classes everywhere, so the teacher has no classes to "
            f"teach; name labelled images with --teacher-labels, or use distillation, which needs none"
        )
    rows = draw((encoded.labels >= 0).nonzero().squeeze(1), MOST)
    embeddings, labels = [], []
    for part in chunks(len(rows), BATCH):
        images = decode_all(encoded, rows[part].tolist(), teacher.manifest.transform.crop, console)
        assert images.labels is not None
        embeddings.append(teacher.embed(images.pixels.permute(0, 2, 3, 1).contiguous()))
        labels.append(images.labels)
    return torch.cat(embeddings), torch.cat(labels)


class _AsTaught(EncodedImages):
    """Images decoded by the teacher's own transform, with which it was trained."""

    def __init__(self, sources: Sequence[str], limit: int | None, transform: Transform) -> None:
        super().__init__(sources, limit)
        self.transform = transform

    def decode(self, i: int, size: int) -> Pixels:  # noqa: ARG002 - the transform has it
        dataset, row = self._place(i)
        return decode(dataset.read(row), self.transform)
