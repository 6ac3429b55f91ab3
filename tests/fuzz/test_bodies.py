"""Bodies that were damaged byte by byte: forms whose boundaries are wrong, JSON that is none, JSON of another shape."""

import base64
from collections.abc import Callable
from typing import Any

import orjson
from hypothesis import strategies as st
from starlette.testclient import TestClient

Damaged = Callable[[dict[str, bytes]], st.SearchStrategy[bytes]]
JSON, FORM = "application/json", "multipart/form-data; boundary=xYzZy"
REFUSED = (400, 404, 409, 413, 415, 422)


def form(images: list[bytes], **fields: str) -> bytes:
    """A multipart body."""
    parts = [
        b'--xYzZy\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n%b\r\n' % data
        for data in images
    ]
    parts += [
        b'--xYzZy\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), text.encode())
        for name, text in fields.items()
    ]
    return b"".join(parts) + b"--xYzZy--\r\n"


def ask(client: TestClient, method: str, path: str, body: bytes, kind: str | bytes) -> int:
    """The status; every reply is JSON of the shape that is promised."""
    reply = client.request(method, path, content=body, headers={"Content-Type": kind, "Accept": JSON})
    content = reply.json()
    if reply.status_code == 200:
        assert "error" not in content
    else:
        assert reply.status_code in REFUSED, (reply.status_code, content)
        assert set(content) == {"error"}
        assert set(content["error"]) == {"code", "message", "param"}
    return reply.status_code


def test_forms(fuzz: Callable[..., None], good: dict[str, bytes], damaged: Damaged, client: TestClient) -> None:
    images = [good["png"], good["gif"], good["jpeg"]]
    items = orjson.dumps([{"id": "a", "label": "x", "metadata": {"k": [1, None]}}, {}, {"id": "b"}]).decode()
    files = {
        "/embed": form(images),
        "/attention": form(images[:1]),
        "/neighbors": form(images[:1]),
        "/gallery/images": form(images, items=items),
    }
    kinds = st.one_of(
        st.just(FORM.encode()),
        damaged({"form": FORM.encode()}).map(
            lambda kind: b"multipart/form-data" + kind.replace(b"\r", b"").replace(b"\n", b"")
        ),
    )
    seen: set[int] = set()
    paths = st.sampled_from(sorted(files))

    def check(case: tuple[str, bytes, bytes]) -> None:
        path, body, kind = case
        seen.add(ask(client, "POST", path, body, kind))

    assert {ask(client, "POST", path, body, FORM) for path, body in files.items()} == {200}
    fuzz(st.tuples(paths, damaged(files), kinds), check, few=500, many=1800)
    assert {200, 400} <= seen


def test_json(fuzz: Callable[..., None], good: dict[str, bytes], damaged: Damaged, client: TestClient) -> None:
    image = base64.b64encode(good["png"]).decode()
    contents: dict[str, Any] = {
        "/embed": {"images": [image, f"data:image/png;base64,{image}"]},
        "/attention": {"images": [image]},
        "/neighbors": {"ids": ["a"], "vectors": [list(range(16))], "negative": ["a", [1] + [0] * 15]},
        "/gallery/images/a": {"label": "x", "metadata": {"k": [1, None]}},
    }
    files = {path: orjson.dumps(content) for path, content in contents.items()}
    assert ask(client, "POST", "/gallery/images?id=a", good["png"], "image/png") == 200
    leaf = st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=9), st.just(image)
    )
    keys = st.one_of(
        st.sampled_from(["images", "ids", "vectors", "negative", "label", "metadata"]), st.text(max_size=3)
    )
    anything = st.recursive(
        leaf,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)),
        max_leaves=12,
    )
    bodies = st.one_of(
        damaged(files),
        anything.map(lambda content: orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS)),
        st.integers(1, 5000).map(lambda depth: b'{"metadata":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"),
        st.integers(1, 5000).map(lambda depth: b"[" * depth + b"]" * depth),
    )
    seen: set[int] = set()

    def check(case: tuple[str, bytes]) -> None:
        path, body = case
        method = "PATCH" if path == "/gallery/images/a" else "POST"
        seen.add(ask(client, method, path, body, JSON))

    for path, body in files.items():
        assert ask(client, "PATCH" if "gallery" in path else "POST", path, body, JSON) == 200, path
    fuzz(st.tuples(st.sampled_from(sorted(files)), bodies), check, few=700, many=1800)
    assert {200, 400} <= seen
