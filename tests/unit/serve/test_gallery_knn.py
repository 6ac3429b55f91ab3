"""The k-NN protocol through a server's gallery, against the same protocol on the same images without a server."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from on_socket import on_socket

from patchsight_serve import embed, knn
from patchsight_serve.app import create_app
from patchsight_serve.client import Client
from patchsight_serve.dataset import read_dataset
from patchsight_serve.embedder import LocalEmbedder
from patchsight_serve.errors import Conflict, InvalidRequest
from patchsight_serve.gallery_knn import evaluate_in_gallery, numbered, read_gallery
from patchsight_serve.labelled import embed_labelled, match_classes, read_labelled
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.protocol import Figures, evaluate
from patchsight_serve.settings import ServeSettings

CLASSES = ["zebra", "cat", "dog"]  # not in the order of the alphabet


@contextmanager
def listening(state: Path, bundle: Path) -> Iterator[str]:
    encoder = OrtEncoder(bundle, 1)
    app = create_app({encoder.manifest.name: encoder}, ServeSettings(sample_gallery=False, state_dir=state))
    with on_socket(app) as url:
        yield url


def parquet(path: Path, images: list[bytes], labels: list[int], names: list[str] | None) -> str:
    column = pa.array([{"bytes": data, "path": f"{i:03}.png"} for i, data in enumerate(images)])
    table = pa.table({"image": column, "label": labels})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path)
    return str(path)


def by_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


Sources = Callable[[list[str] | None], tuple[str, str]]


@pytest.fixture
def sources(tmp_path: Path, encode: Callable[..., bytes]) -> Sources:
    """`sources(class names)`: 240 training images, each picture three times in other bytes and mostly under another
    label, so that there are ties at every k; in the order of their ids. 30 test images, one of which is none."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (80, 16, 16, 3), np.uint8)
    train = sorted((encode(picture) + b"." * n for picture in pixels for n in range(3)), key=by_id)
    test = [encode(picture) for picture in (*pixels[:10], *rng.integers(0, 256, (19, 16, 16, 3), np.uint8))]

    def made(names: list[str] | None) -> tuple[str, str]:
        labels = [rng.integers(0, 3, n).tolist() for n in (len(train), 30)]
        return (
            parquet(tmp_path / "train.parquet", train, labels[0], names),
            parquet(tmp_path / "test.parquet", [*test[:7], b"a text", *test[7:]], labels[1], names),
        )

    return made


def offline(train: str, test: str, bundle: Path, order: int = 1) -> Figures:
    known, asked = read_labelled(train), read_labelled(test)
    embedder = LocalEmbedder(OrtEncoder(bundle, 1))
    gallery, queries = embed_labelled(known, embedder), embed_labelled(match_classes(known, asked), embedder)
    return evaluate(gallery.vectors[::order], gallery.labels[::order], queries.vectors, queries.labels)


@pytest.mark.parametrize("names", [CLASSES, None])
def test_predictions_are_those_of_the_files_to_the_last_image(
    names: list[str] | None, sources: Sources, tiny_bundle: Path, tmp_path: Path
) -> None:
    train, test = sources(names)
    with listening(tmp_path / "state", tiny_bundle) as url, Client(url, batch=7) as client:
        embed.main([train, "--gallery", "known", "--server", url, "--skipped", str(tmp_path / "s.jsonl")])
        gallery = read_gallery(client, "known")
        labels, classes = numbered(gallery, read_labelled(test))
        queries, figures = evaluate_in_gallery(client, gallery, labels, read_labelled(test), lambda _: None)
    assert classes == names
    assert [name for name, _ in queries.skipped] == ["007.png"]
    expected, other = offline(train, test, tiny_bundle), offline(train, test, tiny_bundle, -1)
    assert list(figures.predictions) == list(expected.predictions) == [1, 5, 10, 20, 100, 200]
    for k, predicted in expected.predictions.items():
        assert figures.predictions[k].tolist() == predicted.tolist()
    assert other.predictions[1].tolist() != expected.predictions[1].tolist()  # the order of equal ones does count
    assert (figures.accuracy, figures.interval) == (expected.accuracy, expected.interval)


def test_the_command_prints_what_it_prints_of_files_and_of_an_export(
    sources: Sources, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = sources(CLASSES)

    def report(*arguments: str) -> dict[str, Any]:
        knn.main([*arguments, "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    repository = ["--model-repository", str(tiny_bundle.parent)]
    with listening(tmp_path / "state", tiny_bundle) as url:
        embed.main([train, "--gallery", "known", "--server", url, "--skipped", str(tmp_path / "s.jsonl")])
        embed.main([test, "--out", str(tmp_path / "e.parquet"), *repository])
        capsys.readouterr()
        through = report("--gallery", "known", "--server", url, "--test", test)
        (tmp_path / "export.parquet").write_bytes(httpx.get(f"{url}/gallery/export?gallery=known").content)
        knn.main(["--gallery", "known", "--server", url, "--test", test])
        table = capsys.readouterr().out
    offline = report("--train", train, "--test", test, *repository)
    exported = report("--train", str(tmp_path / "export.parquet"), "--test", str(tmp_path / "e.parquet"))
    for key in ("encoder", "accuracy", "headline", "classes", "classes_only_in_test"):
        assert through[key] == offline[key]
    assert exported["encoder"] == offline["encoder"]
    assert exported["classes"] == 3
    assert through["train"] == {"source": "gallery known", "images": 240, "skipped": []}
    assert through["test"]["images"] == 29
    assert through["protocol"]["ties"] == "by id"
    assert through["protocol"]["index"]["kind"] == "flat"
    assert "(ties by id)" in table
    assert "gallery: 240 images of 3 classes, gallery known" in table


def test_what_cannot_vote_is_said(
    tiny_bundle: Path, tmp_path: Path, encode: Callable[..., bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    images = [encode(np.full((16, 16, 3), 20 * i, np.uint8)) for i in range(8)]
    named = parquet(tmp_path / "named.parquet", images, [0, 1] * 4, ["a", "b"])
    numbers = parquet(tmp_path / "numbers.parquet", images, [0, 1] * 4, None)
    with listening(tmp_path / "state", tiny_bundle) as url, Client(url) as client:
        list(client.add_each([(images[0], {"label": "a"}), (images[1], {})], gallery="half"))
        embed.main([named, "--gallery", "named", "--server", url, "--skipped", str(tmp_path / "s.jsonl")])
        for name, test, message in (
            ("nowhere", named, "no gallery 'nowhere'"),
            ("default", named, "gallery 'default' is empty"),
            ("half", named, "of gallery 'half' has no label"),
            ("named", numbers, "the classes of the test images are numbers, those of gallery 'named' names"),
        ):
            with pytest.raises(SystemExit) as exit:
                knn.main(["--gallery", name, "--server", url, "--test", test])
            assert exit.value.code == 1
            assert message in capsys.readouterr().err
        gallery = read_gallery(client, "named")
        labels, _ = numbered(gallery, read_dataset(named))
        list(client.add_each([(encode(np.zeros((9, 9, 3), np.uint8)), {"label": "a"})], gallery="named"))
        with pytest.raises(Conflict, match="changed during the work"):
            evaluate_in_gallery(client, gallery, labels, read_dataset(named), lambda _: None)
        texts = read_dataset(parquet(tmp_path / "t.parquet", [b"text"], [0], ["a", "b"]))
        with pytest.raises(InvalidRequest, match=r"none of 1 images can be read; 000\.png: .*not an image"):
            evaluate_in_gallery(client, gallery, labels, texts, lambda _: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--test", "x"], "who votes?"),
        (["--test", "x", "--train", "y", "--gallery", "g", "--server", "http://127.0.0.1:1"], "who votes?"),
        (["--test", "x", "--gallery", "g"], "--gallery g needs --server URL"),
        (["--test", "x", "--gallery", "g", "--server", "http://127.0.0.1:1", "--skip-self"], "are for --train"),
    ],
)
def test_a_wrong_setting_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        knn.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
