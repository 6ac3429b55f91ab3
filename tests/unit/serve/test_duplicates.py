"""Groups of near-duplicates over HTTP against brute force: union-find over all pairs, in ids."""

import hashlib
import sqlite3
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from patchsight_serve.duplicates import _linked
from patchsight_serve.galleries import DEFAULT
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import normalize

ENCODER = Identity("vit", "a" * 64)


def clustered(seed: int = 0, count: int = 90, dim: int = 24) -> dict[str, np.ndarray]:
    """Unit vectors around a third as many centers, by id; the ids are in no order."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((count // 3, dim))
    vectors = centers[rng.integers(len(centers), size=count)] + 0.2 * rng.standard_normal((count, dim))
    names = [f"i{i:03d}" for i in rng.permutation(count)]
    return dict(zip(names, normalize(vectors.astype(np.float32)), strict=True))


def fill(client: TestClient, vectors: dict[str, np.ndarray], name: str = DEFAULT, **data: bytes) -> None:
    """data: the bytes of some images; others have bytes of their own."""
    images = [
        NewImage(Item(id, f"label {id}"), data.get(id, id.encode()), b"thumb", vector) for id, vector in vectors.items()
    ]
    client.app.state.galleries.get(name, True).add(images, ENCODER)  # type: ignore[attr-defined]


def ask(client: TestClient, **query: Any) -> dict[str, Any]:
    reply = client.get("/gallery/duplicates", params=query)
    assert reply.status_code == 200, reply.text
    return reply.json()


def expected(vectors: dict[str, np.ndarray], min_score: float) -> list[dict[str, Any]]:
    """Each group's ids, the largest first, then by the first id; and its most central image."""
    exact = {id: vector.astype(np.float64) for id, vector in vectors.items()}
    group = {id: {id} for id in vectors}
    for a, b in combinations(vectors, 2):
        if float(np.float32((exact[a] * exact[b]).sum())) >= min_score and group[a] is not group[b]:
            group[a] |= group[b]
            for id in group[b]:
                group[id] = group[a]
    groups = {min(ids): sorted(ids) for ids in group.values() if len(ids) > 1}
    found = []
    for first in sorted(groups, key=lambda id: (-len(groups[id]), id)):
        ids = groups[first]
        means = {id: sum(float(exact[id] @ exact[other]) for other in ids) / len(ids) for id in ids}
        center = next(id for id in ids if means[id] >= max(means.values()) - 1e-6)
        scores = {id: float(exact[id] @ exact[center]) for id in ids}
        ranked = sorted((id for id in ids if id != center), key=lambda id: -scores[id])
        found.append({"id": first, "members": [(center, 1.0), *((id, scores[id]) for id in ranked)]})
    return found


@pytest.mark.parametrize("min_score", [0.5, 0.9, 0.95])
def test_groups_equal_brute_force(client: TestClient, min_score: float) -> None:
    vectors = clustered()
    fill(client, vectors)
    reply, groups = ask(client, min_score=min_score), expected(vectors, min_score)
    assert len(groups) > 3
    assert (reply["images"], reply["total"], reply["next_cursor"]) == (90, len(groups), None)
    assert reply["encoder"] == {"name": "vit", "sha256": "a" * 64}
    assert [g["id"] for g in reply["groups"]] == [g["id"] for g in groups]
    for group, oracle in zip(reply["groups"], groups, strict=True):
        assert group["size"] == len(oracle["members"])
        assert [m["id"] for m in group["members"]] == [id for id, _ in oracle["members"]]
        assert [m["score"] for m in group["members"]] == pytest.approx([s for _, s in oracle["members"]], abs=1e-6)
        assert all(m["label"] == f"label {m['id']}" and m["copy_of"] is None for m in group["members"])


def test_095_is_the_default(client: TestClient) -> None:
    fill(client, clustered())
    assert ask(client) == ask(client, min_score=0.95) != ask(client, min_score=0.96)


def test_the_order_of_insertion_does_not_matter(client: TestClient) -> None:
    vectors = clustered(1)
    vectors["twin"] = vectors["i000"]
    fill(client, vectors, same=b"x")
    for seed in range(3):
        ids = np.random.default_rng(seed).permutation(list(vectors)).tolist()
        fill(client, {id: vectors[id] for id in ids}, f"g{seed}", same=b"x")
        assert ask(client, gallery=f"g{seed}") == ask(client)


def test_pages_are_the_whole_cut_in_pieces(client: TestClient) -> None:
    fill(client, clustered())
    whole = ask(client, min_score=0.9)["groups"]
    groups, cursor, pages = [], "", 0
    while cursor is not None:
        page = ask(client, min_score=0.9, limit=4, cursor=cursor)
        groups, cursor, pages = groups + page["groups"], page["next_cursor"], pages + 1
        assert page["total"] == len(whole)
    assert groups == whole
    assert pages == -(-len(whole) // 4)
    sizes = [(-group["size"], group["id"]) for group in whole]
    assert all(one < other for one, other in pairwise(sizes))


def test_a_page_goes_on_where_it_was_though_the_gallery_changes(client: TestClient) -> None:
    fill(client, clustered())
    whole = ask(client, min_score=0.9)["groups"]
    first = ask(client, min_score=0.9, limit=4)
    for member in whole[1]["members"]:
        client.delete(f"/gallery/images/{member['id']}").raise_for_status()
    rest = ask(client, min_score=0.9, cursor=first["next_cursor"])
    assert rest["groups"] == whole[4:]
    assert rest["total"] == len(whole) - 1
    assert ask(client, min_score=0.9)["groups"] == whole[:1] + whole[2:]


def test_images_of_the_same_bytes_are_marked(client: TestClient) -> None:
    a, b = normalize(np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32))
    near = normalize(a + 0.05 * b)
    vectors = {"d": a, "c": a, "a": near, "b": a, "other": b}
    fill(client, vectors, b=b"same", c=b"same", d=b"same")
    (group,) = ask(client)["groups"]
    assert {m["id"]: m["copy_of"] for m in group["members"]} == {"a": None, "b": None, "c": "b", "d": "b"}
    assert [m["id"] for m in group["members"]] == ["b", "c", "d", "a"]
    (group,) = ask(client, min_score=1)["groups"]
    assert [m["id"] for m in group["members"]] == ["b", "c", "d"]


def test_added_photos_find_their_copies(client: TestClient, encode: Callable[..., bytes]) -> None:
    """Through the encoder: the same pixels in other bytes have the same vector, and are no copies by sha256."""
    rng = np.random.default_rng(0)
    one, two = (rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2))
    photos = {"a": encode(one), "b": encode(one), "c": encode(one, "BMP"), "d": encode(two)}
    for id, data in photos.items():
        client.post("/gallery/images", params={"id": id}, content=data).raise_for_status()
    (group,) = ask(client, min_score=0.9999)["groups"]
    assert [(m["id"], m["copy_of"]) for m in group["members"]] == [("a", None), ("b", "a"), ("c", None)]
    assert [m["score"] for m in group["members"]] == pytest.approx([1, 1, 1], abs=1e-6)


def test_members_are_listed_up_to_a_number_and_counted_beyond(client: TestClient) -> None:
    vector = normalize(np.ones(8, np.float32))
    fill(client, {f"i{i:03d}": vector for i in range(150)})
    (group,) = ask(client)["groups"]
    assert (group["size"], [m["id"] for m in group["members"]]) == (150, [f"i{i:03d}" for i in range(100)])
    assert len(ask(client, members=1000)["groups"][0]["members"]) == 150
    (group,) = ask(client, members=1)["groups"]
    assert (group["size"], len(group["members"])) == (150, 1)


def test_labels_are_those_of_now(client: TestClient) -> None:
    fill(client, clustered())
    member = ask(client)["groups"][0]["members"][0]
    client.patch(f"/gallery/images/{member['id']}", json={"label": "new"}).raise_for_status()
    assert ask(client)["groups"][0]["members"][0] == member | {"label": "new"}


def test_empty_galleries_and_those_without_duplicates(client: TestClient) -> None:
    nothing = {"encoder": None, "images": 0, "total": 0, "groups": [], "next_cursor": None}
    assert ask(client) == nothing
    fill(client, {"a": normalize(np.ones(8, np.float32))})
    assert ask(client) == nothing | {"images": 1, "encoder": {"name": "vit", "sha256": "a" * 64}}
    assert ask(client, cursor="3.a")["groups"] == []
    client.delete("/gallery/images/a").raise_for_status()
    assert ask(client) == nothing
    reply = client.get("/gallery/duplicates", params={"gallery": "nowhere"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "gallery")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"min_score": 0.49}, "min_score is 0.49, it must be 0.5 to 1: below, nearly all images are linked"),
        ({"min_score": -1}, "it must be 0.5 to 1"),
        ({"min_score": 1.01}, "min_score is 1.01"),
        ({"min_score": "nan"}, "min_score is nan"),
        ({"min_score": "inf"}, "min_score is inf"),
        ({"min_score": "x"}, "min_score"),
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"members": 0}, "members"),
        ({"members": 1001}, "members"),
        ({"cursor": "i003"}, "cursor 'i003' is none that this server gave"),
        ({"cursor": "9" * 5000 + ".a"}, "none that this server gave"),
        ({"cursor": "2."}, "none that this server gave"),
        ({"cursor": "٣.a"}, "none that this server gave"),
    ],
)
def test_what_is_out_of_range_is_400(client: TestClient, query: dict[str, Any], message: str) -> None:
    reply = client.get("/gallery/duplicates", params=query)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == next(iter(query))
    assert message in reply.json()["error"]["message"]


def test_more_than_can_be_compared_are_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(client, clustered(count=30))
    monkeypatch.setattr("patchsight_serve.duplicates.MOST", 30)
    ask(client)
    monkeypatch.setattr("patchsight_serve.duplicates.MOST", 29)
    reply = client.get("/gallery/duplicates")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "gallery")
    assert "has 30 images; every pair is compared, which is done for 29 at most" in reply.json()["error"]["message"]


def test_damaged_rows_are_left_out(serving: Callable[..., TestClient], tmp_path: Path) -> None:
    a, b = normalize(np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32))
    vectors = {"a1": a, "a2": a, "a3": a, "b1": b, "b2": b}
    client = serving(state_dir=tmp_path)
    fill(client, vectors)
    assert [g["size"] for g in ask(client)["groups"]] == [3, 2]

    def damage(*ids: str) -> None:
        with sqlite3.connect(tmp_path / "galleries" / DEFAULT / "gallery.sqlite") as connection:
            for id in ids:
                connection.execute("UPDATE images SET label = 'damaged' WHERE id = ?", (id,))
        connection.close()

    damage("a1")  # under a server that has read it already
    (group, _) = ask(client)["groups"]
    assert (group["size"], {m["id"] for m in group["members"]}) == (2, {"a2", "a3"})
    client.__exit__(None, None, None)
    damage("b2")
    client = serving(state_dir=tmp_path)
    reply = ask(client)
    assert reply["images"] == 3
    assert [[m["id"] for m in g["members"]] for g in reply["groups"]] == [["a2", "a3"]]
    client.__exit__(None, None, None)


def test_the_bytes_are_told_by_their_sha256(client: TestClient) -> None:
    vector = normalize(np.ones(8, np.float32))
    fill(client, {"a": vector, "b": vector}, a=b"x", b=b"x")
    assert client.get("/gallery/images/a").json()["sha256"] == hashlib.sha256(b"x").hexdigest()
    assert [m["copy_of"] for m in ask(client)["groups"][0]["members"]] == [None, "a"]
    fill(client, {"c": vector}, c=b"y")
    assert [m["copy_of"] for m in ask(client)["groups"][0]["members"]] == [None, "a", None]


def test_the_route_is_documented(client: TestClient) -> None:
    get = client.get("/openapi.json").json()["paths"]["/gallery/duplicates"]["get"]
    parameters = {parameter["name"]: parameter["schema"] for parameter in get["parameters"]}
    assert set(parameters) == {"gallery", "min_score", "limit", "members", "cursor"}
    assert (parameters["min_score"]["minimum"], parameters["min_score"]["maximum"]) == (0.5, 1)
    assert {"200", "404", "429"} <= set(get["responses"])


def test_images_whose_bytes_nobody_knows_are_no_copies() -> None:
    """Those that came as vectors alone have no sha256."""
    vectors = np.eye(1, 4, dtype=np.float32).repeat(4, axis=0)
    group = _linked(np.array([10, 11, 12, 13]), vectors, [("a", "", 0), ("b", "", 1), ("c", "x", 2), ("d", "x", 3)])
    assert group.copies == {13: "c"}
