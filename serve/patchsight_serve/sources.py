"""What bulk work is done on: folders, Parquet, globs of images or of Parquet, image files, lists; several, too."""

import glob
import os
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, takewhile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from patchsight_serve.dataset import SUFFIXES, Dataset, from_files, from_parquet, read_dataset
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.nearest import I64

STDIN = "-"
LIST = ".txt"
PARQUET = ".parquet"


def read_sources(sources: Sequence[str], stdin: BinaryIO | None = None) -> Dataset:
    """One dataset of all sources, in their order. A source is

    - a folder, a Parquet file, or a glob of Parquet files, as for `read_dataset`;
    - a glob of images (`photos/**/*.jpg`), or image files: labelled as a folder is, below what all paths begin with;
    - a list `*.txt` with a path in each line, relative to the list's folder, or `-` for one on stdin, relative to the
      working folder: unlabelled.

    Names are relative to the source; of several sources, they begin with it. Classes of several are one where they have
    the same name.

    Raises InvalidRequest: nothing is there, or it holds no image; some classes have names, others are numbers.
    """
    if not sources:
        raise InvalidRequest("there is no source: name a folder, a glob, a Parquet file or a list", "sources")
    parts: list[tuple[str, Dataset]] = []
    for single, group in groupby(sources, lambda source: Path(source).suffix.lower() in SUFFIXES and _is_file(source)):
        if single:
            parts.append(_from_paths(list(group)))
        else:
            parts += [_read(source, stdin) for source in group]
    return parts[0][1] if len(parts) == 1 else _joined(parts)


def _is_file(source: str) -> bool:
    return Path(source).is_file()


def _read(source: str, stdin: BinaryIO | None) -> tuple[str, Dataset]:
    """A source that is no image file; first the folder that its names begin in, or for Parquet the source."""
    path = Path(source)
    if source == STDIN:
        return "", _from_list("stdin", (stdin or sys.stdin.buffer).read(), Path())
    if path.is_file() and path.suffix.lower() == LIST:
        return path.parent.as_posix(), _from_list(source, path.read_bytes(), path.parent)
    if not path.exists() and glob.has_magic(source):
        return _from_glob(source)
    return path.as_posix(), read_dataset(source)


def _from_list(said: str, content: bytes, root: Path) -> Dataset:
    names = [os.fsdecode(line) for line in content.splitlines() if line.strip()]
    if not names:
        raise InvalidRequest(f"{said}: this list names no image; it has a path in each line")
    return Dataset(names, None, None, root)


def _from_glob(pattern: str) -> tuple[str, Dataset]:
    files = [Path(match) for match in glob.glob(pattern, recursive=True) if _is_file(match)]  # noqa: PTH207 - any root
    tables = [path for path in files if path.suffix.lower() == PARQUET]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if tables and images:
        raise InvalidRequest(f"{pattern}: matches both images and Parquet, as {images[0]} and {tables[0]}")
    if tables:
        return pattern, from_parquet(sorted(tables))
    if not images:
        raise InvalidRequest(f"{pattern}: matches no image and no Parquet file")
    root = Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    names = [path.relative_to(root).as_posix() for path in images]
    return root.as_posix(), from_files(root, sorted(names, key=lambda name: name.split("/")))


def _from_paths(paths: list[str]) -> tuple[str, Dataset]:
    """Image files, as a shell names them that expands a glob."""
    try:
        root = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))  # noqa: PTH120 - they are many
    except ValueError:  # some are absolute, others are not
        return "", Dataset(paths, None, None, Path())
    return root.as_posix(), from_files(root, [Path(path).relative_to(root).as_posix() for path in paths])


class Joined:
    """Datasets one behind the other."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = datasets
        self._ends = list(accumulate(map(len, datasets)))

    @property
    def nbytes(self) -> int:
        """Bytes of the images in Parquet files."""
        return sum(dataset.nbytes for dataset in self._datasets)

    def __getitem__(self, i: int) -> bytes:
        """As `Dataset.read`."""
        part = bisect_right(self._ends, i)
        dataset = self._datasets[part]
        return dataset.read(i - self._ends[part] + len(dataset))


def _joined(parts: Sequence[tuple[str, Dataset]]) -> Dataset:
    datasets = [dataset for _, dataset in parts]
    names = [name for prefix, dataset in parts for name in _prefixed(prefix, dataset.names)]
    return Dataset(names, *_labels(parts), Joined(datasets))


def _prefixed(prefix: str, names: Sequence[str]) -> Iterator[str]:
    """A name that is an absolute path stays one."""
    folder = "" if prefix in ("", ".") else prefix.rstrip("/") + "/"
    return (name if name.startswith("/") else folder + name for name in names)


def _labels(parts: Sequence[tuple[str, Dataset]]) -> tuple[I64 | None, list[str] | None]:
    """Of all: as in `Dataset`, with one number for each name of a class."""
    labelled = [(source, dataset) for source, dataset in parts if dataset.labels is not None]
    if not labelled:
        return None, None
    named = {dataset.class_names is not None: source for source, dataset in labelled}
    if len(named) > 1:
        raise InvalidRequest(f"the classes of {named[True]} have names, those of {named[False]} are numbers alone")
    classes = list(dict.fromkeys(name for _, dataset in labelled for name in dataset.class_names or []))
    number = {name: i for i, name in enumerate(classes)}
    labels = []
    for _, dataset in parts:
        own = np.full(len(dataset), -1) if dataset.labels is None else dataset.labels
        if dataset.labels is not None and dataset.class_names is not None:
            own = np.append([number[name] for name in dataset.class_names], -1)[own]
        labels.append(own.astype(np.int64))
    return np.concatenate(labels), classes or None
