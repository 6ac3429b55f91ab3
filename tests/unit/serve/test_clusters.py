"""Clusters over HTTP: those that were planted, with their labels and their most typical images by brute force."""

import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from patchsight_serve.clusters import default_k
from patchsight_serve.galleries import DEFAULT
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import normalize

ENCODER = Identity("vit", "a" * 64)
SIZES = (40, 25, 12, 5)


def planted(seed: int = 0, dim: int = 24) -> tuple[dict[str, np.ndarray], dict[str, str | None]]:
    """Unit vectors around centers, by id, in random order; ids begin with the center's letter. And their labels: five
    different ones in the first cluster, some images without."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((len(SIZES), dim))
    ids = [f"{'abcd'[c]}{i:02d}" for c, size in enumerate(SIZES) for i in range(size)]
    vectors = normalize(
        np.stack([centers["abcd".index(id[0])] + 0.3 * rng.standard_normal(dim) for id in ids]).astype(np.float32)
    )
    order = rng.permutation(len(ids))
    kinds = [["dress", "hat", "hat", "shoes", None, "coat", "bag"], ["hat"], [None], ["shoes", "hat"]]
    labels = {id: kinds["abcd".index(id[0])][i % len(kinds["abcd".index(id[0])])] for i, id in enumerate(ids)}
    return {ids[i]: vectors[i] for i in order}, labels


def fill(
    client: TestClient, vectors: dict[str, np.ndarray], labels: dict[str, str | None] | None = None, name: str = DEFAULT
) -> None:
    images = [
        NewImage(Item(id, (labels or {}).get(id)), id.encode(), b"thumb", vector) for id, vector in vectors.items()
    ]
    client.app.state.galleries.get(name, True).add(images, ENCODER)  # type: ignore[attr-defined]


def ask(client: TestClient, **query: Any) -> dict[str, Any]:
    reply = client.get("/gallery/clusters", params=query)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_planted_clusters_with_their_labels_and_most_typical_images(client: TestClient) -> None:
    vectors, labels = planted()
    fill(client, vectors, labels)
    reply = ask(client, k=4)
    assert (reply["images"], reply["encoder"]) == (82, {"name": "vit", "sha256": "a" * 64})
    assert [c["size"] for c in reply["clusters"]] == list(SIZES)
    for letter, cluster in zip("abcd", reply["clusters"], strict=True):
        own = {id: vector.astype(np.float64) for id, vector in vectors.items() if id[0] == letter}
        center = sum(own.values())
        center /= np.linalg.norm(center)
        best = sorted(own, key=lambda id: -float(own[id] @ center))[:9]
        assert [t["id"] for t in cluster["typical"]] == best
        assert [t["score"] for t in cluster["typical"]] == pytest.approx([own[id] @ center for id in best], abs=1e-5)
        assert [t["label"] for t in cluster["typical"]] == [labels[id] for id in best]
        counts = Counter(labels[id] for id in own if labels[id] is not None)
        top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:3]
        assert cluster["labels"] == [{"label": label, "count": count} for label, count in top]
    assert [len(c["labels"]) for c in reply["clusters"]] == [3, 1, 0, 2]
    assert [len(c["typical"]) for c in reply["clusters"]] == [9, 9, 9, 5]
    assert ask(client, k=4, method="kmeans") == reply


def test_typical_says_how_many(client: TestClient) -> None:
    vectors, _ = planted()
    fill(client, vectors)
    whole = ask(client, k=4, typical=100)
    assert [len(c["typical"]) for c in whole["clusters"]] == list(SIZES)
    assert {t["id"] for c in whole["clusters"] for t in c["typical"]} == set(vectors)
    for cluster, few in zip(whole["clusters"], ask(client, k=4, typical=2)["clusters"], strict=True):
        assert few == cluster | {"typical": cluster["typical"][:2]}


def test_equal_galleries_give_equal_answers(client: TestClient) -> None:
    vectors, labels = planted(1)
    vectors["twin"] = vectors["a07"]
    fill(client, vectors, labels)
    for seed in range(3):
        ids = np.random.default_rng(seed).permutation(list(vectors)).tolist()
        fill(client, {id: vectors[id] for id in ids}, labels, f"g{seed}")
        for k in (3, 4, 9):
            assert ask(client, gallery=f"g{seed}", k=k) == ask(client, k=k)


def test_equal_scores_come_by_id(client: TestClient) -> None:
    vector = normalize(np.ones(8, np.float32))
    fill(client, {f"i{i:03d}": vector for i in reversed(range(150))})
    (cluster,) = ask(client, k=5)["clusters"]  # five were asked for; there is one point
    assert cluster["size"] == 150
    assert [t["id"] for t in cluster["typical"]] == [f"i{i:03d}" for i in range(9)]
    (cluster,) = ask(client, k=5, typical=100)["clusters"]
    assert [t["id"] for t in cluster["typical"]] == [f"i{i:03d}" for i in range(100)]


@pytest.mark.parametrize(
    ("images", "k"), [(1, 1), (2, 2), (8, 2), (12, 2), (13, 3), (200, 10), (20_000, 100), (1_000_000, 100)]
)
def test_the_default_k(images: int, k: int) -> None:
    assert default_k(images) == k


def test_without_k_it_is_the_default(client: TestClient) -> None:
    vectors, _ = planted()
    fill(client, vectors)
    assert default_k(82) == 6
    assert ask(client) == ask(client, k=6)
    assert len(ask(client)["clusters"]) == 6


def test_k_of_one_and_of_all(client: TestClient) -> None:
    vectors, _ = planted()
    fill(client, vectors)
    (cluster,) = ask(client, k=1)["clusters"]
    assert cluster["size"] == 82
    clusters = ask(client, k=82)["clusters"]
    assert [c["size"] for c in clusters] == [1] * 82
    assert [c["typical"][0]["id"] for c in clusters] == sorted(vectors)


def test_labels_and_images_are_those_of_now(client: TestClient) -> None:
    vectors, labels = planted()
    fill(client, vectors, labels)
    before = ask(client, k=4)["clusters"][2]
    first = before["typical"][0]["id"]
    client.patch(f"/gallery/images/{first}", json={"label": "new"}).raise_for_status()
    after = ask(client, k=4)["clusters"][2]
    assert after["labels"] == [{"label": "new", "count": 1}]
    assert after["typical"][0] == before["typical"][0] | {"label": "new"}
    client.delete(f"/gallery/images/{first}").raise_for_status()
    assert first not in {t["id"] for t in ask(client, k=4)["clusters"][2]["typical"]}
    assert ask(client, k=4)["clusters"][2]["size"] == before["size"] - 1


def test_an_empty_gallery_has_no_clusters(client: TestClient) -> None:
    for query in ({}, {"k": 5}, {"typical": 1}):
        assert ask(client, **query) == {"encoder": None, "images": 0, "unclustered": 0, "clusters": []}
    assert client.get("/gallery/clusters", params={"gallery": "nowhere"}).status_code == 404


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"k": 0}, "k"),
        ({"k": -1}, "k"),
        ({"k": 83}, "k is 83, the gallery has 82 images: it must be 1 to 82"),
        ({"k": 1001}, "k"),
        ({"k": "x"}, "k"),
        ({"typical": 0}, "typical"),
        ({"typical": 101}, "typical"),
        ({"method": "dbscan"}, "kmeans"),
    ],
)
def test_what_is_out_of_range_is_400(client: TestClient, query: dict[str, Any], message: str) -> None:
    vectors, _ = planted()
    fill(client, vectors)
    reply = client.get("/gallery/clusters", params=query)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == next(iter(query))
    assert message in reply.json()["error"]["message"]


def test_damaged_rows_are_left_out(serving: Callable[..., TestClient], tmp_path: Path) -> None:
    vectors, labels = planted()
    client = serving(state_dir=tmp_path)
    fill(client, vectors, labels)
    gone = ask(client, k=4)["clusters"][3]["typical"][0]["id"]

    with sqlite3.connect(tmp_path / "galleries" / DEFAULT / "gallery.sqlite") as connection:
        connection.execute("UPDATE images SET metadata = '{\"a\": 1}' WHERE id = ?", (gone,))
    connection.close()
    assert gone not in {t["id"] for t in ask(client, k=4)["clusters"][3]["typical"]}  # under a server that has read it
    client.__exit__(None, None, None)
    client = serving(state_dir=tmp_path)
    reply = ask(client, k=4)
    assert reply["images"] == 81
    assert reply["clusters"][3]["size"] == 4
    client.__exit__(None, None, None)


def test_the_route_is_documented(client: TestClient) -> None:
    get = client.get("/openapi.json").json()["paths"]["/gallery/clusters"]["get"]
    assert {parameter["name"] for parameter in get["parameters"]} == {"gallery", "k", "method", "min_size", "typical"}
    assert {"200", "404", "429"} <= set(get["responses"])
