"""The work of `patchsight-knn`: embed both sources, evaluate, and say the figure together with its protocol."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from patchsight_serve.client import Client
from patchsight_serve.dataset import Dataset
from patchsight_serve.embedder import Embedder, LocalEmbedder
from patchsight_serve.errors import NotFound
from patchsight_serve.knn import KnnSettings
from patchsight_serve.labelled import Embedded, embed_labelled, match_classes, read_labelled
from patchsight_serve.protocol import KS, Figures, evaluate
from patchsight_serve.vote import TEMPERATURE

PROTOCOL = {
    "name": "DINO k-NN",
    "transform": "eval",
    "normalize": "L2",
    "similarity": "cosine",
    "ties": "by row",
    "weights": f"exp(similarity / {TEMPERATURE})",
    "temperature": TEMPERATURE,
    "vote_ties": "lower class",
}


def run(settings: KnnSettings) -> dict[str, Any]:
    """Do it all, print it, and return what `--json` prints. Raises PatchsightError."""
    train = read_labelled(settings.train)
    test = match_classes(train, read_labelled(settings.test))
    with _embedder(settings) as embedder, _progress() as progress:
        embedded = []
        for name, dataset in (("train", train), ("test", test)):
            task = progress.add_task(f"embed {name}", total=len(dataset))
            embedded.append(embed_labelled(dataset, embedder, lambda task=task: progress.advance(task)))  # type: ignore[misc]
        gallery, queries = embedded
        task = progress.add_task("classify", total=len(queries.names))
        figures = evaluate(
            gallery.vectors, gallery.labels, queries.vectors, queries.labels, lambda n: progress.advance(task, n)
        )
    report = _report(settings, embedder, gallery, queries, figures, test)
    if settings.as_json:
        print(json.dumps(report))
    else:
        _print(report)
    return report


@contextmanager
def _embedder(settings: KnnSettings) -> Iterator[Embedder]:
    """The server, or an encoder in this process."""
    if settings.server is not None:
        key = settings.api_key.get_secret_value() if settings.api_key else None
        with Client(settings.server, key, encoder=settings.encoder, output=settings.output) as client:
            yield client
        return
    from patchsight_serve.repository import load_encoders  # ONNX Runtime: not needed where a server does the work

    encoders = load_encoders(settings.model_repository)
    name = settings.encoder or next(iter(encoders))
    if name not in encoders:
        message = f"--encoder {name!r} is not in {settings.model_repository}; there are {', '.join(encoders)}"
        raise NotFound(message, "encoder")
    yield LocalEmbedder(encoders[name], settings.output)


def _progress() -> Progress:
    """On stderr, so that stdout holds the result alone."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _report(
    settings: KnnSettings, embedder: Embedder, gallery: Embedded, queries: Embedded, figures: Figures, test: Dataset
) -> dict[str, Any]:
    missing = sorted(set(queries.labels.tolist()) - set(gallery.labels.tolist()))
    low, high = figures.interval
    return {
        "protocol": PROTOCOL | {"k": list(figures.accuracy), "headline_k": figures.headline},
        "encoder": embedder.encoder._asdict() | {"output": embedder.output},
        "accuracy": {str(k): value for k, value in figures.accuracy.items()},
        "headline": {"k": figures.headline, "accuracy": figures.accuracy[figures.headline], "interval_95": [low, high]},
        "train": _source(settings.train, gallery),
        "test": _source(settings.test, queries),
        "classes": len(np.unique(gallery.labels)),
        "classes_only_in_test": [test.class_names[c] if test.class_names else str(c) for c in missing],
        "server": settings.server,
    }


def _source(source: str, embedded: Embedded) -> dict[str, Any]:
    skipped = [{"name": name, "reason": reason} for name, reason in embedded.skipped]
    return {"source": source, "images": len(embedded.names), "skipped": skipped}


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    encoder, train, test, headline = report["encoder"], report["train"], report["test"], report["headline"]
    protocol, (low, high) = report["protocol"], headline["interval_95"]
    console.print(f"k-NN of {encoder['name']}, {encoder['output']} embedding, sha256 {encoder['sha256']}", markup=False)
    table = Table("k", "accuracy")
    for k, accuracy in report["accuracy"].items():
        table.add_row(k, f"{accuracy:.4f}", style="bold" if int(k) == headline["k"] else "")
    console.print(table)
    lines = [
        f"headline: {headline['k']}-NN {headline['accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f}",
        f"protocol: {protocol['name']}: {protocol['transform']} transform, {protocol['normalize']}-normalized, "
        f"{protocol['similarity']} similarity (ties {protocol['ties']}), votes {protocol['weights']} "
        f"(ties to the {protocol['vote_ties']})",
        f"gallery: {train['images']:,} images of {report['classes']} classes, {train['source']}",
        f"queries: {test['images']:,} images, {test['source']}",
    ]
    if len(report["accuracy"]) < len(KS):
        lines.append(f"left out: k above the gallery's {train['images']:,} images")
    if report["classes_only_in_test"]:
        lines.append(f"always wrong, as the gallery has none: {', '.join(report['classes_only_in_test'])}")
    for name, source in (("gallery", train), ("queries", test)):
        lines += [f"skipped in {name}: {skipped['name']}: {skipped['reason']}" for skipped in source["skipped"]]
    for line in lines:
        console.print(line, markup=False)
