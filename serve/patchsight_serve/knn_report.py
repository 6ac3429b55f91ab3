"""The work of `patchsight-knn`: embed both sources, evaluate, and say the figure together with its protocol."""

import json
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from patchsight_serve.embedder_settings import open_client, open_embedder
from patchsight_serve.embedding_file import holds_embeddings, read_embeddings
from patchsight_serve.errors import Conflict, InvalidRequest
from patchsight_serve.gallery_knn import NO_VECTORS, evaluate_in_gallery, numbered, read_gallery
from patchsight_serve.item import Identity
from patchsight_serve.knn import KnnSettings
from patchsight_serve.labelled import Embedded, check_labels, embed_labelled, match_classes, match_names, read_labelled
from patchsight_serve.nearest import normalize_rows
from patchsight_serve.protocol import KS, FewShot, Figures, evaluate, few_shot
from patchsight_serve.terminal import progress_bar
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
    report = (
        _in_gallery(settings, settings.gallery) if settings.gallery else _of_sources(settings, settings.train or "")
    )
    if settings.as_json:
        print(json.dumps(report))
    else:
        _print(report)
    return report


def _of_sources(settings: KnnSettings, source: str) -> dict[str, Any]:
    """Both sides are files."""
    made = holds_embeddings(source)
    if made != holds_embeddings(settings.test):
        raise InvalidRequest(f"{source} and {settings.test}: one holds embeddings, the other images")
    with progress_bar() as progress:
        gallery, queries, sides = (_read if made else _embed)(settings, source, progress)
        vectors = gallery.vectors, gallery.labels, queries.vectors, queries.labels
        own = match_names(gallery.names, queries.names) if settings.skip_self else None
        task = progress.add_task("classify", total=len(queries.names))
        figures = evaluate(*vectors, lambda n: progress.advance(task, n), own)
        few = [few_shot(*vectors, shots, settings.draws, settings.seed, own) for shots in settings.shots]
    return _report(settings, source, gallery, queries, figures, sides) | {"few_shot": [_few(shot) for shot in few]}


def _in_gallery(settings: KnnSettings, name: str) -> dict[str, Any]:
    """The server's gallery votes."""
    test = read_labelled(settings.test)
    with open_client(settings, settings.server or "") as client, progress_bar() as progress:
        gallery = read_gallery(client, name)
        if settings.encoder not in (None, gallery.encoder.name):
            raise Conflict(
                f"gallery {name!r} is of encoder {gallery.encoder.name!r}, not {settings.encoder!r}", "encoder"
            )
        labels, classes = numbered(gallery, test)
        task = progress.add_task("classify", total=len(test))
        queries, figures = evaluate_in_gallery(client, gallery, labels, test, lambda n: progress.advance(task, n))
    voters = Embedded(list(gallery.labels), labels, NO_VECTORS, [])
    sides = Sides(gallery.encoder, gallery.output, classes)
    report = _report(settings, f"gallery {name}", voters, queries, figures, sides) | {"few_shot": []}
    report["protocol"] = report["protocol"] | {"ties": "by id", "index": gallery.index}
    return report


class Sides(NamedTuple):
    """What both sides have in common: who embedded them, and what their classes are called."""

    encoder: Identity
    output: str
    class_names: list[str] | None


def _embed(settings: KnnSettings, source: str, progress: Progress) -> tuple[Embedded, Embedded, Sides]:
    """Both sides are images."""
    train = read_labelled(source)
    test = match_classes(train, read_labelled(settings.test))
    with open_embedder(settings) as embedder:
        embedded = []
        for name, dataset in (("train", train), ("test", test)):
            task = progress.add_task(f"embed {name}", total=len(dataset))
            embedded.append(embed_labelled(dataset, embedder, lambda task=task: progress.advance(task)))  # type: ignore[misc]
        gallery, queries = embedded
        return gallery, queries, Sides(embedder.encoder, embedder.output, test.class_names)


def _read(settings: KnnSettings, source: str, _: Progress) -> tuple[Embedded, Embedded, Sides]:
    """Both sides are embeddings already."""
    train = check_labels(source, read_embeddings(source))
    test = match_classes(train, check_labels(settings.test, read_embeddings(settings.test)))
    if (train.encoder, train.output) != (test.encoder, test.output) or train.vectors.shape[1] != test.vectors.shape[1]:
        raise InvalidRequest(
            f"{source} and {settings.test} are of different encoders: {train.encoder} ({train.output}, "
            f"{train.vectors.shape[1]} numbers) and {test.encoder} ({test.output}, {test.vectors.shape[1]} numbers)"
        )
    sides = Sides(train.encoder or Identity("unstated", "unstated"), train.output or "unstated", test.class_names)
    embedded = []
    for side in (train, test):
        assert side.labels is not None
        normalize_rows(side.vectors)
        embedded.append(Embedded(side.names, side.labels, side.vectors, []))
    return embedded[0], embedded[1], sides


def _report(
    settings: KnnSettings, source: str, gallery: Embedded, queries: Embedded, figures: Figures, sides: Sides
) -> dict[str, Any]:
    missing = sorted(set(queries.labels.tolist()) - set(gallery.labels.tolist()))
    low, high = figures.interval
    return {
        "protocol": PROTOCOL
        | {"k": list(figures.accuracy), "headline_k": figures.headline, "skip_self": settings.skip_self},
        "encoder": sides.encoder._asdict() | {"output": sides.output},
        "accuracy": {str(k): value for k, value in figures.accuracy.items()},
        "headline": {"k": figures.headline, "accuracy": figures.accuracy[figures.headline], "interval_95": [low, high]},
        "train": _source(source, gallery),
        "test": _source(settings.test, queries),
        "classes": len(np.unique(gallery.labels)),
        "classes_only_in_test": [sides.class_names[c] if sides.class_names else str(c) for c in missing],
        "server": settings.server,
    }


def _few(found: FewShot) -> dict[str, Any]:
    deviation = float(np.std(found.accuracy, ddof=1)) if len(found.accuracy) > 1 else None
    return {
        "shots": found.shots,
        "draws": len(found.accuracy),
        "accuracy": float(np.mean(found.accuracy)),
        "deviation": deviation,
        "classes_with_fewer": len(found.short),
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
    if protocol.get("index", {}).get("recall") is not None:
        lines.append(f"the gallery is searched approximately, at a recall of {protocol['index']['recall']:.3f}")
    if protocol["skip_self"]:
        lines.append("an image of the gallery with the query's name does not vote")
    for few in report["few_shot"]:
        spread = "" if few["deviation"] is None else f" ± {few['deviation']:.4f}"
        fewer = f"; {few['classes_with_fewer']} classes have fewer" if few["classes_with_fewer"] else ""
        lines.append(f"{few['shots']} per class: {few['accuracy']:.4f}{spread} over {few['draws']} draws{fewer}")
    if len(report["accuracy"]) < len(KS):
        lines.append(f"left out: k above the gallery's {train['images']:,} images")
    if report["classes_only_in_test"]:
        lines.append(f"always wrong, as the gallery has none: {', '.join(report['classes_only_in_test'])}")
    for name, source in (("gallery", train), ("queries", test)):
        lines += [f"skipped in {name}: {skipped['name']}: {skipped['reason']}" for skipped in source["skipped"]]
    for line in lines:
        console.print(line, markup=False)
