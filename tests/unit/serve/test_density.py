"""Clusters by density: those that scikit-learn finds, asked directly, and through the route; noise is in none."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import HDBSCAN
from sklearn.metrics import adjusted_rand_score
from starlette.testclient import TestClient

from patchsight_serve import density
from patchsight_serve.density import hdbscan
from patchsight_serve.errors import InvalidRequest, NotReady
from patchsight_serve.galleries import DEFAULT
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import normalize


def planted(seed: int = 0, noise: int = 30, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors in random order, and the cluster of each, -1 for those that are anywhere."""
    rng = np.random.default_rng(seed)
    centers = 3 * normalize(rng.standard_normal((4, dim)).astype(np.float32))
    owner = np.repeat([0, 1, 2, 3, -1], [40, 25, 12, 8, noise])
    rng.shuffle(owner)
    vectors = np.where(owner[:, None] < 0, 0, centers[owner]) + 0.1 * rng.standard_normal((len(owner), dim))
    return normalize(vectors.astype(np.float32)), owner


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    """Noise where the other has noise, and clusters that differ by their numbers alone."""
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist())) and ((one < 0) == (other < 0)).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("min_size", [3, 5, 10])
def test_it_is_what_scikit_learn_finds(seed: int, min_size: int) -> None:
    vectors, truth = planted(seed)
    found = hdbscan(vectors, min_size)
    directly = HDBSCAN(min_cluster_size=min_size, copy=True).fit_predict(vectors)
    assert adjusted_rand_score(found.owner, directly) > 0.97  # equal distances may go either way at a cluster's edge
    sizes = np.bincount(found.owner[found.owner >= 0])
    assert sizes.min() >= min_size
    if min_size == 5:
        inside = truth >= 0
        assert same_partition(found.owner[inside], truth[inside])
        assert (found.owner[~inside] < 0).mean() > 0.5


def test_centers_are_mean_directions_and_scores_the_cosines_to_them() -> None:
    vectors, _ = planted()
    found = hdbscan(vectors, 5)
    for cluster, center in enumerate(found.centers):
        own = vectors[found.owner == cluster].astype(np.float64)
        mean = own.sum(axis=0) / np.linalg.norm(own.sum(axis=0))
        assert center == pytest.approx(mean, abs=1e-6)
        assert found.scores[found.owner == cluster] == pytest.approx(own @ mean, abs=1e-6)
    assert not found.scores[found.owner < 0].any()


def test_the_order_of_the_vectors_changes_nothing() -> None:
    vectors, _ = planted(1)
    found = hdbscan(vectors, 5).owner
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(vectors))
        assert (hdbscan(vectors[order], 5).owner == found[order]).all()


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_fewer_than_a_cluster_has_are_in_none(count: int) -> None:
    found = hdbscan(planted()[0][:count], 5)
    assert found.owner.tolist() == [-1] * count
    assert found.centers.shape == (0, 16)


def test_equal_vectors_break_nothing() -> None:
    vectors = np.repeat(planted()[0][:3], 20, axis=0)
    owner = hdbscan(vectors, 5).owner
    assert same_partition(owner, np.repeat([0, 1, 2], 20))
    hdbscan(vectors[:20], 5)


def test_it_ends_where_nobody_waits() -> None:
    def left() -> None:
        raise NotReady("the server is leaving")

    with pytest.raises(NotReady):
        hdbscan(planted()[0], 5, left)


def test_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "MAX_VECTORS", 99)
    with pytest.raises(InvalidRequest, match="the gallery has 115, the limit is 99") as refused:
        hdbscan(planted()[0], 5)
    assert refused.value.param == "method"


def fill(client: TestClient, vectors: np.ndarray, names: Callable[[int], str]) -> None:
    images = [NewImage(Item(names(i)), names(i).encode(), b"thumb", vector) for i, vector in enumerate(vectors)]
    client.app.state.galleries.get(DEFAULT, True).add(images, Identity("vit", "a" * 64))  # type: ignore[attr-defined]


def ask(client: TestClient, status: int = 200, **query: Any) -> dict[str, Any]:
    reply = client.get("/gallery/clusters", params={"method": "hdbscan"} | query)
    assert reply.status_code == status, reply.text
    return reply.json()


def test_over_http(client: TestClient) -> None:
    vectors, truth = planted()
    fill(client, vectors, lambda i: f"{'abcdn'[truth[i]]}{i:03d}")
    reply = ask(client, typical=100)
    found = hdbscan(vectors, 5)
    assert reply["images"] + reply["unclustered"] == len(vectors)
    assert reply["unclustered"] == int((found.owner < 0).sum()) > 10
    assert [c["size"] for c in reply["clusters"]] == sorted(np.bincount(found.owner[found.owner >= 0]), reverse=True)
    by_size = np.argsort(-np.bincount(found.owner[found.owner >= 0]), kind="stable")
    for number, cluster in zip(by_size, reply["clusters"], strict=True):
        rows = np.flatnonzero(found.owner == number)
        scores = {f"{'abcdn'[truth[i]]}{i:03d}": float(found.scores[i]) for i in rows}
        assert {t["id"]: t["score"] for t in cluster["typical"]} == pytest.approx(scores, abs=1e-6)
        assert [t["id"] for t in cluster["typical"]] == sorted(scores, key=lambda id: (-scores[id], id))
    assert ask(client, min_size=5, typical=100) == reply
    assert all(c["size"] >= 20 for c in ask(client, min_size=20)["clusters"])
    kmeans = client.get("/gallery/clusters").json()
    assert (kmeans["images"], kmeans["unclustered"]) == (len(vectors), 0)
    nothing = ask(client, min_size=900)
    assert (nothing["images"], nothing["unclustered"], nothing["clusters"]) == (0, len(vectors), [])


def test_what_cannot_be_asked(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(client)["clusters"] == []
    error = ask(client, 400, k=3)["error"]
    assert (error["param"], error["message"][:9]) == ("k", "k is 3, b")
    error = ask(client, 400, method="kmeans", min_size=3)["error"]
    assert error["param"] == "min_size"
    assert ask(client, 400, min_size=1)["error"]["param"] == "min_size"
    monkeypatch.setattr(density, "MAX_VECTORS", 2)
    fill(client, planted()[0], lambda i: f"i{i}")
    assert "the gallery has 115, the limit is 2" in ask(client, 400)["error"]["message"]
    monkeypatch.setattr(density, "find_spec", lambda _: None)
    error = ask(client, 400)["error"]
    assert (error["param"], error["message"][-24:]) == ("method", "pip install scikit-learn")
