"""A region searched over HTTP: planted ones are found where they are, scores are those of literal loops, the rest of
the server goes on."""

import asyncio
import contextlib
import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient

from patchsight_serve import region_search
from patchsight_serve.decode import decode
from patchsight_serve.fake_encoder import FakeEncoder

BOX = (0.25, 0.25, 0.75, 0.75)  # twice its side is all of the picture: the view is what the encoder sees anyway
QUERY = {"box": ",".join(map(str, BOX))}
IMAGES = 30


def pictures() -> tuple[np.ndarray, list[np.ndarray], dict[str, tuple[float, ...]]]:
    """A picture, others, and in which of these its region is, where: pasted patch on patch."""
    rng = np.random.default_rng(0)
    query = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    others = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(IMAGES)]
    planted = {}
    for i, (x, y) in ((3, (0, 0)), (11, (16, 4)), (25, (8, 16))):
        others[i][y : y + 16, x : x + 16] = query[8:24, 8:24]
        planted[f"i{i:02d}"] = (x / 32, y / 32, (x + 16) / 32, (y + 16) / 32)
    return query, others, planted


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def fill(client: TestClient, images: list[np.ndarray], **query: str) -> None:
    items = [{"id": f"i{i:02d}", "label": "ab"[i % 2], "metadata": {"n": i}} for i in range(len(images))]
    files = [("images", (f"{i}.png", png(image))) for i, image in enumerate(images)]
    client.post("/gallery/images", files=files, data={"items": json.dumps(items)}, params=query).raise_for_status()


def ask(client: TestClient, image: bytes, status: int = 200, **query: Any) -> dict[str, Any]:
    reply = client.post("/neighbors/region", content=image, params=QUERY | query, headers={"Content-Type": "image/png"})
    assert reply.status_code == status, reply.text
    return reply.json()


def test_a_planted_region_is_found_and_where_it_is(client: TestClient) -> None:
    query, others, planted = pictures()
    fill(client, others)
    reply = ask(client, png(query), k=3)
    assert {n["id"]: tuple(n["box"]) for n in reply["neighbors"]} == planted
    assert [n["score"] for n in reply["neighbors"]] == pytest.approx([1, 1, 1], abs=1e-5)
    assert [(n["label"], n["metadata"]) for n in reply["neighbors"]] == [
        ("ab"[int(n["id"][1:]) % 2], {"n": int(n["id"][1:])}) for n in reply["neighbors"]
    ]
    assert (reply["looked_at"], reply["without_original"], reply["unreadable"]) == (IMAGES, 0, 0)
    assert reply["encoder"]["name"] == "fake"


def test_scores_and_order_are_those_of_literal_loops(client: TestClient) -> None:
    query, others, _ = pictures()
    fill(client, others)
    encoder = FakeEncoder()

    def tokens(image: np.ndarray) -> np.ndarray:
        seen = decode(png(image), encoder.manifest.transform)
        (found,) = encoder.run(seen[None], ["patch_tokens"])["patch_tokens"].astype(np.float64)
        return found / np.linalg.norm(found, axis=2, keepdims=True)

    region = tokens(query)[2:6, 2:6].reshape(-1, 16)
    scores = {
        f"i{i:02d}": np.mean([max(float(token @ other) for other in tokens(image).reshape(-1, 16)) for token in region])
        for i, image in enumerate(others)
    }
    best = ask(client, png(query), k=IMAGES)["neighbors"]
    assert {n["id"]: n["score"] for n in best} == pytest.approx(scores, abs=1e-5)
    assert [(-n["score"], n["id"]) for n in best] == sorted((-n["score"], n["id"]) for n in best)


def test_of_an_indexed_image_it_is_the_same_without_itself(client: TestClient) -> None:
    query, others, planted = pictures()
    fill(client, others)
    client.post("/gallery/images", content=png(query), params={"id": "query"}).raise_for_status()
    by_upload = ask(client, png(query), k=10)["neighbors"]
    assert by_upload[0]["id"] in {*planted, "query"}
    reply = client.get("/neighbors/region", params={**QUERY, "id": "query", "k": 9}).json()
    assert reply["neighbors"] == [n for n in by_upload if n["id"] != "query"]
    assert reply["looked_at"] == IMAGES


def test_no_more_are_looked_at_than_asked_for_and_they_are_the_nearest(client: TestClient) -> None:
    query, others, _ = pictures()
    fill(client, others)
    reply = ask(client, png(query), k=5, candidates=7)
    assert (reply["looked_at"], len(reply["neighbors"])) == (7, 5)
    near = client.post("/neighbors", content=png(query), params={"k": 4}).json()["neighbors"]
    looked = ask(client, png(query), k=7, candidates=7)["neighbors"]
    assert {n["id"] for n in near} <= {n["id"] for n in looked}
    some = ask(client, png(query), k=30, label="a", filter='{"n": {"lt": 9}}')["neighbors"]
    assert {n["id"] for n in some} == {"i00", "i02", "i04", "i06", "i08"}


def test_of_a_wide_image_the_box_is_in_fractions_of_all_of_it(client: TestClient) -> None:
    query, others, _ = pictures()
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = others[11]  # what the encoder sees; the region is at 16, 4 of it
    fill(client, [wide])
    ((found),) = ask(client, png(query))["neighbors"]
    assert found["box"] == pytest.approx([48 / 96, 4 / 32, 64 / 96, 20 / 32])


def test_images_without_original_are_counted_and_a_gallery_without_any_is_a_conflict(
    client: TestClient, serving: Callable[..., TestClient], tmp_path: Any
) -> None:
    query, others, planted = pictures()
    fill(client, others)
    record = client.app.state.galleries.get("default").record  # type: ignore[attr-defined]
    with record.transaction():
        record.execute("UPDATE pictures SET original = NULL WHERE key IN (1, 2)")
        record.execute("UPDATE pictures SET original = X'00' WHERE key = 3")
    reply = ask(client, png(query), k=3)
    assert (reply["looked_at"], reply["without_original"], reply["unreadable"]) == (IMAGES - 3, 2, 1)
    assert {n["id"] for n in reply["neighbors"]} == set(planted)
    error = client.get("/neighbors/region", params={**QUERY, "id": "i00"}).json()["error"]
    assert (error["code"], error["param"]) == ("conflict", "id")
    bare = serving(state_dir=tmp_path, keep_originals=False)
    fill(bare, others[:4])
    error = ask(bare, png(query), 409)["error"]
    assert "original of none of the 4 nearest" in error["message"]
    assert ask(bare, png(query), 404, gallery="nowhere")["error"]["param"] == "gallery"


def test_an_empty_gallery_has_none(client: TestClient) -> None:
    query, _, _ = pictures()
    reply = ask(client, png(query))
    assert (reply["neighbors"], reply["looked_at"]) == ([], 0)


@pytest.mark.parametrize(
    ("query", "param", "message"),
    [
        ({"box": "0,0,2,1"}, "box", "fractions of the picture"),
        ({"box": "0,0,0.01,1"}, "box", "the least is one each"),
        ({"k": 11, "candidates": 10}, "k", "k is 11, of 10 candidates"),
        ({"candidates": 501}, "candidates", "less than or equal to 500"),
        ({"filter": "{"}, "filter", "filter"),
    ],
)
def test_what_cannot_be_asked(client: TestClient, query: dict[str, Any], param: str, message: str) -> None:
    error = ask(client, png(pictures()[0]), 400, **query)["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_an_encoder_without_patches_and_a_damaged_picture(serving: Callable[..., TestClient], tmp_path: Any) -> None:
    client = serving(FakeEncoder(patch_size=None), state_dir=tmp_path)
    error = ask(client, png(pictures()[0]), 400)["error"]
    assert error["param"] == "encoder"
    assert "has no output 'patch_tokens'" in error["message"]
    other = serving(state_dir=tmp_path / "other")
    assert ask(other, png(pictures()[0])[:60], 422)["error"]["code"] == "damaged_image"
    assert other.get("/neighbors/region", params={**QUERY, "id": "none"}).status_code == 404


class Gated(FakeEncoder):
    """Stops the runs that are for patch tokens alone at a gate, and counts their images."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.gate, self.images = threading.Event(), threading.Event(), 0

    def run(self, images, outputs):
        if list(outputs) == ["patch_tokens"]:
            self.inside.set()
            assert self.gate.wait(60)
            self.images += len(images)
        return super().run(images, outputs)


def test_a_client_that_leaves_ends_the_work(serving: Callable[..., TestClient], tmp_path: Any) -> None:
    encoder = Gated()
    client = serving(encoder, state_dir=tmp_path)
    query, others, _ = pictures()
    fill(client, others)
    body = png(query)
    head = {"type": "http", "method": "POST", "path": "/neighbors/region", "query_string": urlencode(QUERY).encode()}
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.to_thread(encoder.inside.wait, 60)
        return {"type": "http.disconnect"}

    async def scenario() -> None:
        scope = head | {"headers": [(b"content-type", b"image/png")], "http_version": "1.1", "scheme": "http"}
        with contextlib.suppress(ClientDisconnect):
            await client.app(scope, receive, lambda _: asyncio.sleep(0))
        encoder.gate.set()

    assert client.portal is not None
    client.portal.call(scenario)
    assert encoder.images < region_search.BATCH  # of what was in work
    assert client.app.state.region_searches._waiting == 0  # type: ignore[attr-defined]
    assert ask(client, body)["looked_at"] == IMAGES
    assert encoder.images >= IMAGES


def test_others_are_answered_meanwhile(serving: Callable[..., TestClient], tmp_path: Any) -> None:
    """All searches that there may be wait; their images leave room for everybody else."""
    encoder = Gated()
    client = serving(encoder, state_dir=tmp_path)
    query, others, planted = pictures()
    fill(client, others)
    admitted = client.app.state.service.encoder().engine  # type: ignore[attr-defined]
    with ThreadPoolExecutor() as pool:
        searches = [pool.submit(ask, client, png(query), k=3) for _ in range(3)]
        assert encoder.inside.wait(60)
        assert admitted.admitted <= region_search.AT_WORK * region_search.BATCH
        embedded = pool.submit(client.post, "/embed", content=png(others[0]))
        encoder.gate.set()
        assert embedded.result(60).status_code == 200
        for search in searches:
            assert {n["id"] for n in search.result(60)["neighbors"]} == set(planted)


def test_a_full_server_is_waited_for(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    query, others, planted = pictures()
    fill(client, others)
    monkeypatch.setattr(region_search, "PAUSE_S", 0.0)
    service = client.app.state.service  # type: ignore[attr-defined]
    admitted, asked = service.admitted, []

    def busy_at_first(images: int, loaded: Any, bulk: bool | None = None) -> Any:
        if bulk:
            asked.append(images)
            if len(asked) in (1, 3):
                raise region_search.Overloaded("the queue is full")
        return admitted(images, loaded, bulk)

    monkeypatch.setattr(service, "admitted", busy_at_first)
    assert {n["id"] for n in ask(client, png(query), k=3)["neighbors"]} == set(planted)
    assert asked == [16, 16, 14, 14]


def test_few_at_a_time_and_the_others_wait_or_are_refused(client: TestClient) -> None:
    searches = client.app.state.region_searches  # type: ignore[attr-defined]

    async def scenario() -> None:
        go, inside = asyncio.Event(), []

        async def one() -> None:
            async with searches.admitted():
                inside.append(1)
                await go.wait()

        tasks = [asyncio.create_task(one()) for _ in range(region_search.WAITING)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(inside) == region_search.AT_WORK
        with pytest.raises(region_search.Overloaded, match="8 searches for regions are waiting, the limit is 8"):
            await one()
        tasks[0].cancel()
        go.set()
        with contextlib.suppress(asyncio.CancelledError):
            await tasks[0]
        await asyncio.gather(*tasks[1:])
        assert len(inside) == region_search.WAITING
        async with searches.admitted():
            pass

    assert client.portal is not None
    client.portal.call(scenario)


def test_it_ends_in_time(serving: Callable[..., TestClient], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serving(state_dir=tmp_path, timeout_s=0.3)
    query, others, _ = pictures()
    fill(client, others[:3])
    service = client.app.state.service  # type: ignore[attr-defined]
    admitted = service.admitted

    def never(images: int, loaded: Any, bulk: bool | None = None) -> Any:
        if bulk:
            raise region_search.Overloaded("the queue is full")
        return admitted(images, loaded, bulk)

    monkeypatch.setattr(service, "admitted", never)
    error = ask(client, png(query), 504)["error"]
    assert (error["param"], error["message"][:23]) == ("candidates", "no answer within 0.3 s;")


def test_the_routes_are_documented(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]["/neighbors/region"]
    names = {"gallery", "encoder", "box", "k", "candidates", "label", "filter"}
    assert {p["name"] for p in paths["post"]["parameters"]} == names
    assert {p["name"] for p in paths["get"]["parameters"]} == {*names, "id"}
    assert {"200", "400", "404", "409", "429", "504"} <= set(paths["get"]["responses"])
