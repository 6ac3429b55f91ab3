"""The k-NN protocol against one written out in loops, and the command in process against the command on a server."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import pytest
from on_socket import on_socket

from patchsight_serve import knn, protocol
from patchsight_serve.app import create_app
from patchsight_serve.client import Client
from patchsight_serve.dataset import read_dataset
from patchsight_serve.embedder import LocalEmbedder
from patchsight_serve.errors import InvalidRequest, NotFound, PatchsightError
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.labelled import embed_labelled, match_classes, match_names, read_labelled
from patchsight_serve.nearest import normalize
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.protocol import Rows, evaluate, few_shot, wilson
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_serve.settings import ServeSettings
from patchsight_serve.vote import vote

# ---- the protocol, written out in loops from its description


def cosine_of(a: np.ndarray, b: np.ndarray) -> np.float32:
    return np.float32(min(1.0, max(-1.0, math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True)))))


def neighbors_of(query: np.ndarray, gallery: np.ndarray) -> list[tuple[np.float32, int]]:
    return sorted(((cosine_of(query, g), row) for row, g in enumerate(gallery)), key=lambda pair: (-pair[0], pair[1]))


def class_of(neighbors: list[tuple[np.float32, int]], labels: np.ndarray, k: int) -> int:
    votes: dict[int, float] = {}
    for similarity, row in neighbors[:k]:
        votes[int(labels[row])] = votes.get(int(labels[row]), 0.0) + math.exp(float(similarity) / 0.07)
    best = max(votes.values())
    return min(label for label, weight in votes.items() if weight == best)


def blobs(count: int, dim: int = 8, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).standard_normal((classes, dim))
    labels = rng.integers(0, classes, count)
    return normalize((centers[labels] + rng.standard_normal((count, dim))).astype(np.float32)), labels


@pytest.mark.parametrize("copies", [1, 3])
def test_predictions_equal_the_protocol_written_in_loops(copies: int) -> None:
    """With copies, every vector is there three times under different labels: ties in rank everywhere."""
    base, _ = blobs(90)
    gallery = np.concatenate([base] * copies)
    labels = np.random.default_rng(1).integers(0, 4, len(gallery))
    queries, truth = blobs(40, seed=2)
    queries[:10] = base[:10]
    figures = evaluate(gallery, labels, queries, truth)
    ranked = [neighbors_of(query, gallery) for query in queries]
    assert list(figures.predictions) == [k for k in (1, 5, 10, 20, 100, 200) if k <= len(gallery)]
    for k, predicted in figures.predictions.items():
        expected = [class_of(neighbors, labels, k) for neighbors in ranked]
        assert predicted.tolist() == expected
        assert figures.accuracy[k] == np.mean([e == t for e, t in zip(expected, truth, strict=True)])
    similarity, rows = Rows(gallery).search(queries, 30)
    assert rows.tolist() == [[row for _, row in neighbors[:30]] for neighbors in ranked]
    assert similarity.tolist() == [[score for score, _ in neighbors[:30]] for neighbors in ranked]


def test_brute_force_faiss_and_the_protocol_agree_on_every_prediction() -> None:
    """Of vectors without ties, where FAISS's own order is the order."""
    gallery, labels = blobs(3000, 16, 7)
    queries, truth = blobs(500, 16, 7, seed=5)
    figures = evaluate(gallery, labels, queries, truth)
    similarity, rows = faiss.knn(queries, gallery, 200, metric=faiss.METRIC_INNER_PRODUCT)
    exact = queries.astype(np.float64) @ gallery.T.astype(np.float64)
    by_hand = np.argsort(-exact, axis=1)[:, :200]
    for k, predicted in figures.predictions.items():
        assert vote(similarity, labels[rows], 7, k).tolist() == predicted.tolist()
        weights = np.exp(np.take_along_axis(exact, by_hand, 1)[:, :k] / 0.07)
        votes = np.stack([(weights * (labels[by_hand[:, :k]] == c)).sum(axis=1) for c in range(7)], axis=1)
        assert votes.argmax(axis=1).tolist() == predicted.tolist()


def test_an_image_does_not_vote_for_itself() -> None:
    """Each row against all others, in loops; and a query that is not in the gallery keeps all of it."""
    gallery, _ = blobs(60)
    gallery = np.concatenate([gallery, gallery[:5]])  # copies: the other one may vote
    labels = np.random.default_rng(1).integers(0, 4, 65)
    stranger, _ = blobs(1, seed=8)
    own = np.append(np.arange(65), -1)
    figures = evaluate(gallery, labels, np.concatenate([gallery, stranger]), np.append(labels, 0), own=own)
    assert list(figures.predictions) == [1, 5, 10, 20]
    for k, predicted in figures.predictions.items():
        for row in range(65):
            others = [pair for pair in neighbors_of(gallery[row], gallery) if pair[1] != row]
            assert predicted[row] == class_of(others, labels, k)
        assert predicted[65] == class_of(neighbors_of(stranger[0], gallery), labels, k)
    with pytest.raises(InvalidRequest, match="a gallery of 1 images leaves no neighbor"):
        evaluate(gallery[:1], labels[:1], gallery[:1], labels[:1], own=np.array([0]))


def test_few_shots_are_the_protocol_on_what_was_drawn() -> None:
    gallery, labels = blobs(200)
    gallery, labels = np.concatenate([gallery, gallery[:2]]), np.append(labels, [9, 9])  # a class of two images
    queries, truth = blobs(100, seed=3)
    found = few_shot(gallery, labels, queries, truth, 3, 4, seed=1)
    assert (found.shots, len(found.accuracy), found.short) == (3, 4, [9])
    assert len(set(found.accuracy)) > 1
    assert found == few_shot(gallery, labels, queries, truth, 3, 4, seed=1)
    assert found != few_shot(gallery, labels, queries, truth, 3, 4, seed=2)
    everything = few_shot(gallery, labels, queries, truth, 1000, 2)
    assert everything.accuracy == [evaluate(gallery, labels, queries, truth).accuracy[20]] * 2
    one = few_shot(gallery, labels, gallery, labels, 1000, 1, own=np.arange(202))
    assert one.accuracy == [evaluate(gallery, labels, gallery, labels, own=np.arange(202)).accuracy[20]]


def test_names_tell_which_image_is_meant() -> None:
    assert match_names(["a", "b", "c"], ["c", "x", "a"]).tolist() == [2, -1, 0]
    with pytest.raises(InvalidRequest, match="two images of the gallery are called 'a'"):
        match_names(["a", "b", "a"], ["a"])


def test_ties_among_more_copies_than_any_margin_go_by_row() -> None:
    (vector,) = normalize(np.ones((1, 8), np.float32))
    gallery = np.tile(vector, (500, 1))
    _, rows = Rows(gallery).search(gallery[:1], 7)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunking_does_not_change_a_prediction(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, labels = blobs(400, dim=32)
    queries, truth = blobs(100, dim=32, seed=1)
    whole = evaluate(gallery, labels, queries, truth)
    monkeypatch.setattr(protocol, "CHUNK", chunk)
    done = []
    parts = evaluate(gallery, labels, queries, truth, done.append)
    assert sum(done) == 100
    for k in whole.predictions:
        assert (parts.predictions[k] == whole.predictions[k]).all()


def test_equal_votes_go_to_the_lower_class() -> None:
    similarity = np.array([[0.5, 0.5, 0.5, 0.5]], np.float32)
    labels = np.array([[3, 1, 1, 3]])
    assert vote(similarity, labels, 4, 4).tolist() == [1]
    assert vote(similarity, labels, 4, 1).tolist() == [3]
    # One near neighbor outweighs many far ones: exp(0.9 / 0.07) > 3 exp(0.8 / 0.07).
    assert vote(np.array([[0.9, 0.8, 0.8, 0.8]], np.float32), np.array([[0, 1, 1, 1]]), 2, 4).tolist() == [0]
    assert vote(np.array([[0.9, 0.85, 0.85, 0.85]], np.float32), np.array([[0, 1, 1, 1]]), 2, 4).tolist() == [1]


@pytest.mark.parametrize(
    ("size", "ks", "headline"),
    [(1, [1], 1), (4, [1], 1), (5, [1, 5], 5), (19, [1, 5, 10], 10), (150, [1, 5, 10, 20, 100], 20)],
)
def test_k_above_the_gallery_is_left_out(size: int, ks: list[int], headline: int) -> None:
    gallery, labels = blobs(size)
    figures = evaluate(gallery, labels, *blobs(3, seed=1))
    assert list(figures.accuracy) == ks
    assert figures.headline == headline


def test_a_class_missing_on_either_side_is_no_error() -> None:
    gallery, labels = blobs(60)
    labels = np.where(labels == 3, 2, labels)
    queries, truth = blobs(30, seed=1)
    truth = np.where(truth == 1, 0, truth)
    figures = evaluate(gallery, labels, queries, truth)
    assert set(figures.predictions[20].tolist()) <= {0, 1, 2}
    assert figures.accuracy[20] <= 1 - (truth == 3).mean()


@pytest.mark.parametrize(("right", "total"), [(0, 3), (3, 3), (1, 3), (5800, 10_000), (1, 10_000)])
def test_the_interval_solves_wilsons_equation(right: int, total: int) -> None:
    """Its ends are those p from which right / total is just 1.96 standard deviations of p away."""
    low, high = wilson(right, total)
    p = right / total
    for end in (low, high):
        if 0 < end < 1:
            assert abs(p - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / total), rel=1e-6)
    assert 0 <= low <= p <= high <= 1
    assert (low == 0, high == 1) == (right == 0, right == total)


# ---- sources


def test_classes_are_matched_by_name_where_folders_number_their_own(tmp_path: Path, encode) -> None:
    for source, classes in (("train", ["ant", "bee", "cat"]), ("test", ["bee", "cat", "dog"])):
        for name in classes:
            (tmp_path / source / name).mkdir(parents=True)
            (tmp_path / source / name / "1.png").write_bytes(encode(np.zeros((4, 4, 3), np.uint8)))
    train, test = read_labelled(str(tmp_path / "train")), read_labelled(str(tmp_path / "test"))
    assert test.labels.tolist() == [0, 1, 2]
    matched = match_classes(train, test)
    assert matched.labels.tolist() == [1, 2, 3]
    assert matched.class_names == ["ant", "bee", "cat", "dog"]


def test_sources_without_labels_are_refused(tmp_path: Path, encode) -> None:
    (tmp_path / "1.png").write_bytes(encode(np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(InvalidRequest, match="has no labels"):
        read_labelled(str(tmp_path))


class Nan(FakeEncoder):
    """Gives NaN for black images."""

    def run(self, images, outputs):
        black = (images == 0).all(axis=(1, 2, 3))
        return {name: np.where(black[:, None], np.nan, values) for name, values in super().run(images, outputs).items()}


def test_an_embedding_of_nan_names_its_image(tmp_path: Path, encode) -> None:
    for name, value in (("a/1.png", 9), ("b/2.png", 0)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encode(np.full((32, 32, 3), value, np.uint8)))
    with pytest.raises(PatchsightError, match="the embedding of b/2.png holds NaN"):
        embed_labelled(read_labelled(str(tmp_path)), LocalEmbedder(Nan()))


# ---- in process and through a server


@contextmanager
def listening(*encoders, **settings) -> Iterator[str]:
    """URL of a real server on a real socket."""
    loaded = {encoder.manifest.name: encoder for encoder in encoders}
    app = create_app(loaded, ServeSettings(sample_gallery=False, **settings))
    with on_socket(app) as url:
        yield url


@pytest.fixture
def sources(tmp_path: Path) -> tuple[str, str]:
    """Folders of the sample photos, 12 and 3 per class, with some bad files among them."""
    samples = read_dataset(SAMPLES)
    count: dict[int, int] = {}
    for i, label in enumerate(samples.labels.tolist()):
        count[label] = count.get(label, 0) + 1
        if count[label] <= 15:
            folder = tmp_path / ("train" if count[label] <= 12 else "test") / samples.class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:03d}.jpg").write_bytes(samples.read(i))
    (tmp_path / "train" / "hat" / "000-empty.jpg").write_bytes(b"")
    (tmp_path / "train" / "hat" / "zzz-text.jpg").write_bytes(b"a text")
    (tmp_path / "test" / "dress" / "cut.jpg").write_bytes(samples.read(0)[:3000])
    return str(tmp_path / "train"), str(tmp_path / "test")


SKIPPED = {"train": ["hat/000-empty.jpg", "hat/zzz-text.jpg"], "test": ["dress/cut.jpg"]}


def test_server_and_process_give_the_same_predictions_to_the_last_image(sources, tiny_bundle: Path) -> None:
    train, test = (read_labelled(source) for source in sources)
    with listening(OrtEncoder(tiny_bundle, 1), max_images=24, max_queue=32) as url, Client(url, batch=32) as client:
        local = LocalEmbedder(OrtEncoder(tiny_bundle, 1))
        assert client.encoder == local.encoder
        assert client.output == local.output == "cls"
        results = []
        for embedder in (local, client):
            gallery, queries = embed_labelled(train, embedder), embed_labelled(test, embedder)
            assert [name for name, _ in gallery.skipped] == SKIPPED["train"]
            assert [name for name, _ in queries.skipped] == SKIPPED["test"]
            results.append(
                (gallery, queries, evaluate(gallery.vectors, gallery.labels, queries.vectors, queries.labels))
            )
    (g0, q0, here), (g1, q1, there) = results
    assert g0.names == g1.names
    assert g0.skipped == g1.skipped
    assert np.abs(g0.vectors - g1.vectors).max() < 1e-6
    assert len(q0.names) == len(q1.names) == 30
    for k in here.predictions:
        assert here.predictions[k].tolist() == there.predictions[k].tolist()
    assert here.accuracy == there.accuracy


def test_the_command_prints_the_same_json_both_ways(sources, tiny_bundle: Path, capsys) -> None:
    command = ["--train", sources[0], "--test", sources[1], "--json"]
    knn.main([*command, "--model-repository", str(tiny_bundle.parent)])
    here = json.loads(capsys.readouterr().out)
    with listening(OrtEncoder(tiny_bundle, 1), api_keys="secret") as url:
        knn.main([*command, "--server", url, "--api-key", "secret"])
    there = json.loads(capsys.readouterr().out)
    assert there["server"].startswith("http://127.0.0.1:")
    assert here.pop("server") is None
    del there["server"]
    assert here == there

    assert list(here["accuracy"]) == ["1", "5", "10", "20", "100"]
    assert here["encoder"] == {
        "name": "tiny",
        "sha256": LocalEmbedder(OrtEncoder(tiny_bundle)).encoder.sha256,
        "output": "cls",
    }
    assert here["protocol"]["temperature"] == 0.07
    assert here["protocol"]["headline_k"] == here["headline"]["k"] == 20
    low, high = here["headline"]["interval_95"]
    assert low < here["headline"]["accuracy"] == here["accuracy"]["20"] < high
    for source, images in (("train", 120), ("test", 30)):
        assert here[source]["images"] == images
        assert [skipped["name"] for skipped in here[source]["skipped"]] == SKIPPED[source]
    assert "damaged" in here["test"]["skipped"][0]["reason"]


def test_the_table_stands_beside_its_protocol(sources, tiny_bundle: Path, capsys) -> None:
    knn.main(
        ["--train", sources[0], "--test", sources[1], "--model-repository", str(tiny_bundle.parent), "--output", "mean"]
    )
    out, err = capsys.readouterr()
    assert "k-NN of tiny, mean embedding" in out
    assert "headline: 20-NN 0." in out
    assert "95 % interval" in out
    assert "votes exp(similarity / 0.07)" in out
    assert "left out: k above the gallery's 120 images" in out
    assert "skipped in queries: dress/cut.jpg" in out
    assert "embed train" in err


def test_a_set_against_itself_and_with_few_labels(sources, tiny_bundle: Path, capsys) -> None:
    command = ["--train", sources[0], "--test", sources[0], "--model-repository", str(tiny_bundle.parent)]
    knn.main([*command, "--json"])
    with_itself = json.loads(capsys.readouterr().out)
    knn.main([*command, "--json", "--skip-self", "--shots", "1", "--shots", "5", "--draws", "3"])
    without = json.loads(capsys.readouterr().out)
    assert with_itself["accuracy"]["1"] == 1.0 > without["accuracy"]["1"]
    assert (with_itself["protocol"]["skip_self"], without["protocol"]["skip_self"]) == (False, True)
    assert with_itself["few_shot"] == []
    assert [(few["shots"], few["draws"]) for few in without["few_shot"]] == [(1, 3), (5, 3)]
    assert all(0 < few["accuracy"] < 1 and few["deviation"] >= 0 for few in without["few_shot"])
    knn.main([*command, "--skip-self", "--shots", "50"])
    out = capsys.readouterr().out
    assert "an image of the gallery with the query's name does not vote" in out
    assert "50 per class: 0." in out
    assert "over 5 draws; 10 classes have fewer" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "nowhere", "--test", "nowhere"], "nowhere: no such folder"),
        (["--train", str(SAMPLES), "--test", str(SAMPLES)], "--model-repository"),
        (["--train", str(SAMPLES), "--test", str(SAMPLES), "--server", "http://127.0.0.1:1"], "http://127.0.0.1:1: "),
        (["--train", str(SAMPLES), "--test", str(SAMPLES), "--server", "no url"], "no url"),
    ],
)
def test_what_cannot_work_exits_with_1_and_says_why(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        knn.main(arguments)
    assert exit.value.code == 1
    assert message in capsys.readouterr().err


def test_a_missing_flag_exits_with_2(capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        knn.main(["--train", "x"])
    assert exit.value.code == 2
    assert "--test" in capsys.readouterr().err


def test_an_unknown_encoder_lists_the_known(tiny_bundle: Path, capsys) -> None:
    arguments = ["--train", str(SAMPLES), "--test", str(SAMPLES), "--encoder", "other"]
    with pytest.raises(SystemExit):
        knn.main([*arguments, "--model-repository", str(tiny_bundle.parent)])
    assert "'other' is not in" in capsys.readouterr().err
    with listening(FakeEncoder()) as url, pytest.raises(NotFound, match="has no encoder 'other'; it has fake"):
        Client(url, encoder="other")
