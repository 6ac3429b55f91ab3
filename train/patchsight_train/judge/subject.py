"""Who is judged: embeddings of two labelled sides, and as far as they are there the pictures and the encoder behind."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from patchsight_serve.dataset import Dataset, read_dataset
from patchsight_serve.decode import decode
from patchsight_serve.embedding_file import holds_embeddings, read_embeddings
from patchsight_serve.errors import InvalidRequest
from patchsight_serve.labelled import check_labels, match_classes, match_names, read_labelled
from patchsight_serve.manifest import load_manifest
from patchsight_train.build import recommended_pooling
from patchsight_train.data import eval_transform
from patchsight_train.encoder import Encoder
from patchsight_train.initial import is_run, read_encoder
from patchsight_train.judge.features import Features, TorchEmbedder, embed_side
from patchsight_train.judge.settings import EvalSettings
from patchsight_train.run import read_config
from patchsight_train.whitening import Whitening

SHOWN = 96  # pixels of a picture without an encoder that says how large


@dataclass(frozen=True)
class Pictures:
    """The images behind one side's features: row i of the features is image `rows[i]` of the data set; −1 has none."""

    dataset: Dataset
    rows: Tensor
    size: int

    def __getitem__(self, chosen: Sequence[int]) -> Tensor:
        """Those images at the eval transform: uint8 `(n, 3, size, size)`; a missing one is gray."""
        out = torch.full((len(chosen), 3, self.size, self.size), 128, dtype=torch.uint8)
        for place, i in enumerate(chosen):
            row = int(self.rows[i])
            if row >= 0:
                pixels = decode(self.dataset.read(row), eval_transform(self.size))
                out[place] = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
        return out


@dataclass(frozen=True)
class Subject:
    """recommended: the kind of embedding that counts. about: facts for the report, in order. encoder: None where only
    embeddings were given; the pictures: None where they were not."""

    name: str
    recommended: str
    about: dict[str, Any]
    train: Features
    test: Features
    class_names: list[str]
    encoder: Encoder | None = None
    train_pictures: Pictures | None = None
    test_pictures: Pictures | None = None
    whitening: Mapping[str, Whitening] = field(default_factory=dict)  # of a bundle's embeddings, by kind


def subjects(settings: EvalSettings, device: torch.device, progress: Progress) -> Iterator[Subject]:
    """One after the other; each has read its images anew.

    Raises:
        InvalidRequest: a source is neither run nor bundle, a side has no labels or cannot be read.
        PatchsightError: an embedding is not finite; the image is named.
    """
    made = holds_embeddings(settings.train), holds_embeddings(settings.test)
    if any(made) != all(made):
        raise InvalidRequest(f"{settings.train} and {settings.test}: one holds embeddings, the other images")
    if all(made):
        if settings.source:
            raise InvalidRequest(f"--source {settings.source[0]}: {settings.train} holds embeddings already")
        yield _of_embeddings(settings)
        return
    if not settings.source:
        raise InvalidRequest(f"{settings.train} holds images: give --source, the run folder or bundle of their encoder")
    train = _first(read_labelled(settings.train), settings.limit_train)
    test = _first(match_classes(train, read_labelled(settings.test)), settings.limit_test)
    for source in settings.source:
        yield _of_encoder(source, train, test, device, progress)


def _of_encoder(source: Path, train: Dataset, test: Dataset, device: torch.device, progress: Progress) -> Subject:
    encoder, where = read_encoder(source)
    name, whitening = source.resolve().name, _whitening(source)
    embedder = TorchEmbedder(encoder, name, device, whitening)
    sides = []
    for side, dataset in (("train", train), ("test", test)):
        task = progress.add_task(f"{name}: embed {side}", total=len(dataset))
        sides.append(embed_side(dataset, embedder, lambda task=task: progress.advance(task)))  # type: ignore[misc]
    size = encoder.config.image_size
    pictures = [Pictures(dataset, side.rows, size) for dataset, side in zip((train, test), sides, strict=True)]
    recommended, trained_on = _described(source, encoder)
    parameters = sum(p.numel() for p in encoder.parameters())
    about = {"source": where, "trained on": trained_on, "parameters": f"{parameters:,}", "picture": f"{size} px"}
    names = _names(test.class_names, *sides)
    return Subject(name, recommended, about, sides[0], sides[1], names, encoder, pictures[0], pictures[1], whitening)


def _whitening(source: Path) -> dict[str, Whitening]:
    """Of a bundle; a run folder has none."""
    if is_run(source):
        return {}
    from patchsight_train.onnx_weights import read_whitening  # onnx is there: the encoder has been read by it

    return read_whitening(source / "1" / "model.onnx")


def _described(source: Path, encoder: Encoder) -> tuple[str, str]:
    """Which embedding counts, and what it was trained on."""
    if is_run(source):
        config = read_config(source)
        data = config.get("dataset") or ", ".join(map(str, config.get("data", [])))
        return recommended_pooling(config, encoder.config), str(data)
    manifest = load_manifest(source)
    return manifest.recommended, manifest.data


def _of_embeddings(settings: EvalSettings) -> Subject:
    train = check_labels(settings.train, read_embeddings(settings.train))
    test = match_classes(train, check_labels(settings.test, read_embeddings(settings.test)))
    made_by = [(side.encoder, side.output, side.vectors.shape[1]) for side in (train, test)]
    if made_by[0] != made_by[1]:
        raise InvalidRequest(f"{settings.train} and {settings.test} are of different encoders: {made_by}")
    kind = train.output or "embedding"
    sides: list[Features] = []
    pictures: list[Pictures | None] = []
    for rows, limit, images in (
        (train, settings.limit_train, settings.train_images), (test, settings.limit_test, settings.test_images),
    ):  # fmt: skip
        assert rows.labels is not None
        names, vectors = rows.names[:limit], torch.from_numpy(rows.vectors[:limit])
        labels = torch.tensor(rows.labels[:limit])
        sides.append(Features(names, torch.arange(len(names)), labels, {kind: vectors}, []))
        pictures.append(_pictures_named(names, images) if images else None)
    name = train.encoder.name if train.encoder else "embeddings"
    about = {"source": f"embeddings, {settings.train}", "sha256": train.encoder.sha256 if train.encoder else "unstated"}
    class_names = _names(test.class_names, *sides)
    return Subject(name, kind, about, sides[0], sides[1], class_names, None, pictures[0], pictures[1])


def _pictures_named(names: list[str], images: str) -> Pictures:
    dataset = read_dataset(images)
    rows = torch.from_numpy(match_names(dataset.names, names))
    if bool((rows < 0).all()):
        raise InvalidRequest(f"{images}: has no image that is called like an embedding, such as {names[0]!r}")
    return Pictures(dataset, rows, SHOWN)


def _first(dataset: Dataset, limit: int | None) -> Dataset:
    """The data set's first images; the others stay where they are."""
    if limit is None or dataset.labels is None:
        return dataset
    return replace(dataset, names=dataset.names[:limit], labels=dataset.labels[:limit])


def _names(known: list[str] | None, train: Features, test: Features) -> list[str]:
    """Of every class that either side has."""
    count = 1 + int(max(train.labels.max(), test.labels.max()))
    return [*(known or []), *map(str, range(len(known or []), count))]
