"""Labelled images and their embeddings: what a k-NN figure is computed from."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.embedder import Embedder, embed_dataset
from patchsight_serve.embedding_file import Embeddings
from patchsight_serve.errors import InvalidRequest, PatchsightError
from patchsight_serve.nearest import F32, I64, normalize

Labelled = TypeVar("Labelled", Dataset, Embeddings)


@dataclass(frozen=True)
class Embedded:
    """The images of a source that could be read, in its order: names, labels int64 `(M,)`, unit vectors float32
    `(M, D)`; and the name and the reason of each other one."""

    names: list[str]
    labels: I64
    vectors: F32
    skipped: list[tuple[str, str]]


def read_labelled(source: str) -> Dataset:
    """As `read_dataset`. Raises InvalidRequest also where there are no labels, or negative ones."""
    return check_labels(source, read_dataset(source))


def check_labels(source: str, rows: Labelled) -> Labelled:
    """Raises InvalidRequest where one has none."""
    if rows.labels is None:
        raise InvalidRequest(f"{source}: has no labels; give class folders, or Parquet with a column `label`")
    if rows.labels.min() < 0:
        row = int(rows.labels.argmin())
        raise InvalidRequest(f"{source}: the label of {rows.names[row]} is {rows.labels[row]}; they begin with 0")
    return rows


def match_classes(train: Labelled, test: Labelled) -> Labelled:
    """`test` with the class numbers of `train`: folders number their own classes, and where one lacks a class, all
    behind it are shifted. A class that only `test` has gets a number of its own, for which no neighbor can vote."""
    if train.class_names is None or test.class_names is None or test.labels is None:
        return test
    names = train.class_names + [name for name in test.class_names if name not in train.class_names]
    number = np.array([names.index(name) for name in test.class_names], dtype=np.int64)
    return replace(test, labels=number[test.labels], class_names=names)


def match_names(gallery: list[str], queries: list[str]) -> I64:
    """For each query the gallery's row of the same name, −1 where there is none: int64 `(Q,)`.

    Raises InvalidRequest where two images of the gallery share a name: then it does not tell which is meant.
    """
    row = {name: i for i, name in enumerate(gallery)}
    if len(row) < len(gallery):
        name = next(name for i, name in enumerate(gallery) if row[name] != i)
        raise InvalidRequest(f"two images of the gallery are called {name!r}: names do not tell which a query is")
    return np.array([row.get(name, -1) for name in queries], dtype=np.int64)


def embed_labelled(dataset: Dataset, embedder: Embedder, advance: Callable[[], None] = lambda: None) -> Embedded:
    """Embed all images of a labelled dataset, to unit vectors. advance, and raises: as `embed_rows`."""
    assert dataset.labels is not None
    rows, vectors, skipped = embed_rows(dataset, embedder, advance)
    return Embedded([dataset.names[i] for i in rows], dataset.labels[rows], normalize(vectors), skipped)


def embed_rows(
    dataset: Dataset, embedder: Embedder, advance: Callable[[], None] = lambda: None
) -> tuple[list[int], F32, list[tuple[str, str]]]:
    """The rows that could be read, their vectors float32 `(M, D)` as they are, and name and reason of each other one.

    advance: called after each image.

    Raises InvalidRequest if none can be read; PatchsightError, with its name, for an embedding without direction.
    """
    rows: list[int] = []
    vectors: list[F32] = []
    skipped: list[tuple[str, str]] = []
    for i, result in enumerate(embed_dataset(dataset, embedder)):
        if isinstance(result, PatchsightError):
            skipped.append((dataset.names[i], result.message))
        elif not np.isfinite(result).all() or not result.any():
            raise PatchsightError(f"the embedding of {dataset.names[i]} holds NaN or infinity, or has length 0")
        else:
            rows.append(i)
            vectors.append(result)
        advance()
    if not rows:
        name, reason = skipped[0]
        raise InvalidRequest(f"none of {len(dataset)} images can be read; {name}: {reason}")
    return rows, np.stack(vectors), skipped
