"""The pictures of a judgement, each a PNG: confusion, neighbors of what was told rightly and wrongly, the 2-D map,
attention, and what fires each unit. Those whose pictures or encoder are missing are left out."""

import io
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Tensor

from patchsight_serve.nearest import normalize
from patchsight_serve.protocol import Rows
from patchsight_train.data import draw
from patchsight_train.evaluation import cls_attention
from patchsight_train.judge.confusion import confusion_chart
from patchsight_train.judge.judgement import Judgement
from patchsight_train.judge.plane import MOST, atlas, chosen_for_atlas, project, scatter
from patchsight_train.judge.units import class_information, unit_sheet
from patchsight_train.pictures import attention_sheet, neighbor_sheet
from patchsight_train.views import eval_view
from patchsight_train.vit import ViT

SHOWN, NEIGHBORS = 6, 6
UNITS, FIRED = 8, 2000  # units of a sheet, and test images that may fire them

Draw = Callable[[Judgement], Image | Figure | None]
CAPTIONS = {
    "neighbors_right": "Rightly told: test images, and the training images that are most similar to each. Green frames "
    "are of the same class.",
    "neighbors_wrong": "Wrongly told: the same for test images whose neighbors voted for another class.",
    "confusion": "Which class is taken for which by the k-NN vote: each row is a true class.",
    "map": "The test images' embeddings by t-SNE. What lies together is alike to the encoder; distances between groups "
    "say nothing.",
    "atlas": "The same map, with one picture in each cell.",
    "attention": "Where the encoder looks: attention of its last block, from the CLS token to the patches, mean and "
    "each head.",
    "units": "Channels of the embedding that tell most of the class, with the test images that are highest on each.",
}


def draw_all(judgement: Judgement) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each picture that can be drawn, in the order of `CAPTIONS`."""
    drawers: dict[str, Draw] = {
        "neighbors_right": lambda j: neighbors(j, right=True), "neighbors_wrong": lambda j: neighbors(j, right=False),
        "confusion": confusions, "attention": attention, "units": units,
    }  # fmt: skip
    points = plane(judgement)
    drawers |= {"map": lambda j: points and mapped(j, *points), "atlas": lambda j: points and pictured(j, *points)}
    for name in CAPTIONS:
        drawn = drawers[name](judgement)
        if drawn is not None:
            yield name, _png(drawn)


def neighbors(judgement: Judgement, right: bool) -> Image | None:
    """Test images of as many classes as possible whose vote was right, or wrong."""
    subject = judgement.subject
    if subject.train_pictures is None or subject.test_pictures is None:
        return None
    labels, names = subject.test.labels, subject.class_names
    chosen = one_of_each(labels, ((judgement.predicted == labels) == right).nonzero().squeeze(1))
    if not chosen:
        return None
    kind = subject.recommended
    gallery = normalize(subject.train.kinds[kind].numpy())
    queries = normalize(subject.test.kinds[kind][chosen].numpy())
    similarity, rows = Rows(gallery).search(queries, min(NEIGHBORS, len(gallery)))
    shown = torch.stack([subject.train_pictures[row.tolist()] for row in rows]) / 255
    of_rows = [[names[c] for c in subject.train.labels[row].tolist()] for row in torch.from_numpy(rows)]
    truth = [names[c] for c in labels[chosen].tolist()]
    return neighbor_sheet(subject.test_pictures[chosen] / 255, shown, torch.from_numpy(similarity), truth, of_rows)


def one_of_each(labels: Tensor, rows: Tensor, count: int = SHOWN) -> list[int]:
    """Of `rows`, int64, `count` at most: the first of each class, then the second of each."""
    seen: dict[int, int] = {}
    rank = []
    for label in labels[rows].tolist():
        rank.append(seen.get(label, 0))
        seen[label] = rank[-1] + 1
    chosen: list[int] = rows[torch.tensor(rank, dtype=torch.int64).argsort(stable=True)][:count].tolist()
    return chosen


def confusions(judgement: Judgement) -> Figure:
    return confusion_chart(judgement.confusion, judgement.subject.class_names)


def plane(judgement: Judgement) -> tuple[Tensor, np.ndarray] | None:
    """Which test images are on the map, and where; None for fewer than four."""
    test = judgement.subject.test
    some = draw(torch.arange(len(test)), MOST)
    if len(some) < 4:
        return None
    return some, project(F.normalize(test.kinds[judgement.subject.recommended][some], dim=1))


def mapped(judgement: Judgement, some: Tensor, points: np.ndarray) -> Figure:
    return scatter(points, judgement.subject.test.labels[some], judgement.subject.class_names)


def pictured(judgement: Judgement, some: Tensor, points: np.ndarray) -> Image | None:
    pictures = judgement.subject.test_pictures
    if pictures is None:
        return None
    rows, cells = chosen_for_atlas(points)
    return atlas(pictures[some[rows].tolist()], cells)


@torch.no_grad()
def attention(judgement: Judgement) -> Image | None:
    subject = judgement.subject
    if not isinstance(subject.encoder, ViT) or subject.test_pictures is None:
        return None
    labels = subject.test.labels
    pixels = subject.test_pictures[one_of_each(labels, torch.arange(len(labels)))]
    device = subject.encoder.cls_token.device
    maps = cls_attention(subject.encoder, eval_view(pixels.to(device))).cpu()
    return attention_sheet(pixels / 255, maps)


def units(judgement: Judgement) -> Image | None:
    """Those that tell most of the class."""
    subject = judgement.subject
    if subject.test_pictures is None:
        return None
    some = draw(torch.arange(len(subject.test)), FIRED)
    z, labels = subject.test.kinds[subject.recommended][some], subject.test.labels[some]
    order = class_information(z, labels).nan_to_num(nan=-1).argsort(descending=True, stable=True)[:UNITS]
    return unit_sheet(subject.test_pictures[some.tolist()], z, order.tolist(), labels, subject.class_names)


def _png(drawn: Image | Figure) -> bytes:
    file = io.BytesIO()
    if isinstance(drawn, Figure):
        drawn.savefig(file, format="png", dpi=120, facecolor="white")
    else:
        drawn.save(file, "PNG")
    return file.getvalue()
