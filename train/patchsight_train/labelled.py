"""Labelled images for supervised training: which of them are used, and the same number for a class on every side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from torch import Generator, Tensor

from patchsight_serve.errors import InvalidRequest
from patchsight_train.data import EncodedImages, Images, decode_all, room_for
from patchsight_train.update import mix


@dataclass(frozen=True)
class Labelled:
    """One side: images as they lie on disk, those `rows` of them, int64 `(n,)`, ascending, that have a label, and the
    `number` of each of its own labels on the training side, int64, from `count` on for classes that are unknown there.

    class_names: in the order of numbers; None where the data names none.
    """

    encoded: EncodedImages
    rows: Tensor
    number: Tensor
    class_names: list[str] | None

    @property
    def labels(self) -> Tensor:
        """Of `rows`, int64 `(n,)`, by the training side's numbers."""
        assert self.encoded.labels is not None
        return self.number[self.encoded.labels[self.rows]]

    @property
    def classes(self) -> int:
        """How many numbers there are: every class that is named, or up to the largest label."""
        return len(self.number)

    def drawn(self, share: float, seed: int) -> "Labelled":
        """As `draw_balanced` has it."""
        return replace(self, rows=self.rows[draw_balanced(self.labels, share, seed)])

    def decode(self, size: int, console: Console) -> Images:
        """uint8 `(n, 3, size, size)` in memory, labels by the training side's numbers. What cannot be read is left out
        and named.

        Raises:
            InvalidRequest: they do not fit into memory, or none could be read.
            DataLost: as `load_images`.
        """
        fits, why = room_for(len(self.rows), size)
        if not fits:
            raise InvalidRequest(f"{why}; use less --labels, or a smaller --image-size or --stored-size")
        images = decode_all(self.encoded, self.rows.tolist(), size, console)
        assert images.labels is not None
        return Images(images.pixels, self.number[images.labels], self.class_names)


def open_training(sources: Sequence[str], limit: int | None = None) -> Labelled:
    """The side whose classes are learned.

    Raises:
        InvalidRequest: a source is missing or empty, has no labels, or other classes than the others; or there is one
            class only.
    """
    encoded, rows = _open(sources, "--data", limit)
    assert encoded.labels is not None
    present = torch.unique(encoded.labels[rows])
    if len(present) < 2:
        raise InvalidRequest(f"--data {', '.join(sources)}: all labelled images are of one class; 2 are needed")
    count = len(encoded.class_names) if encoded.class_names else int(present.max()) + 1
    return Labelled(encoded, rows, torch.arange(count), encoded.class_names)


def open_judging(sources: Sequence[str], flag: str, training: Labelled) -> Labelled:
    """A side to judge by. Classes are matched by name, or by number where neither side names any. One that training
    lacks gets a number beyond its own: it can never be found.

    Raises:
        InvalidRequest: as `open_training`; or each side has a class that the other lacks, so that it is unclear which
            is which.
    """
    encoded, rows = _open(sources, flag)
    ours, theirs = training.class_names, encoded.class_names
    if ours is None and theirs is None:
        assert encoded.labels is not None
        return Labelled(encoded, rows, torch.arange(int(encoded.labels.max()) + 1), None)
    if ours is None or theirs is None:
        named, other = (flag, "--data") if ours is None else ("--data", flag)
        raise InvalidRequest(f"the classes of {named} have names, those of {other} only numbers: which is which?")
    unknown, missing = ([name for name in x if name not in y] for x, y in ((theirs, ours), (ours, theirs)))
    if unknown and missing:
        raise InvalidRequest(f"different classes: only {flag} has {_some(unknown)}, only --data has {_some(missing)}")
    names = [*ours, *unknown]
    return Labelled(encoded, rows, torch.tensor([names.index(name) for name in theirs]), names)


def _open(sources: Sequence[str], flag: str, limit: int | None = None) -> tuple[EncodedImages, Tensor]:
    """The images, and which have a label."""
    encoded = EncodedImages(sources, limit)
    if encoded.labels is None:
        raise InvalidRequest(
            f"{flag} {', '.join(sources)}: no labels, or not the same classes in all of them; a folder needs one "
            f"subfolder for each class, Parquet a column `label`"
        )
    largest, names = int(encoded.labels.max()), encoded.class_names
    if names is not None and largest >= len(names):
        raise InvalidRequest(f"{flag} {', '.join(sources)}: has the label {largest}, but only {len(names)} class names")
    return encoded, (encoded.labels >= 0).nonzero().squeeze(1)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def draw_balanced(labels: Tensor, share: float, seed: int) -> Tensor:
    """Which of the labels int64 `(n,)`, 0 or more, a share of them is: positions, int64, ascending.

    They are dealt in turn, one of each class, until the share is reached, but at least one of each: so classes are
    alike, up to one, as far as each has images. Which of a class, is by chance and the seed.
    """
    shuffled = torch.randperm(len(labels), generator=Generator().manual_seed(mix(seed, 0, 3)))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = torch.unique(labels, return_counts=True)[1]
    turn = torch.cat([torch.arange(int(count)) for count in counts])  # of each of `by_class` in its class
    taken = max(round(share * len(labels)), len(counts))
    return by_class[turn.argsort(stable=True)[:taken]].sort().values
