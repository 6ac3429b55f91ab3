"""Accept headers, and JSON that a client reads back bit by bit."""

import base64

import numpy as np
import orjson
import pytest

from patchsight_serve.errors import InvalidRequest, Overloaded, PatchsightError, Unauthorized
from patchsight_serve.replies import JSON, NPY, NPZ, PNG, RAW, error_reply, json_reply, negotiate, packed


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, JSON),
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("application/x-npy", NPY),
        ("Application/X-NPY", NPY),
        ("application/octet-stream;q=0.5, application/x-npz", NPZ),
        ("application/json;q=0.1, */*;q=0.2", NPY),
        ("application/json;q=0, */*", NPY),
        ("text/html,application/xhtml+xml,*/*;q=0.8", JSON),
    ],
)
def test_negotiate(accept: str | None, expected: str) -> None:
    assert negotiate(accept, (JSON, NPY, NPZ, RAW)) == expected


def test_the_first_offer_wins_where_nobody_minds() -> None:
    assert negotiate("*/*", (PNG, JSON)) == PNG


@pytest.mark.parametrize("accept", ["text/csv", "image/*", "application/json;q=0", "application/json;q=much", ";;,"])
def test_nothing_acceptable(accept: str) -> None:
    with pytest.raises(InvalidRequest, match="the reply can only be"):
        negotiate(accept, (JSON, NPY))


def test_json_gives_back_each_float32() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    read = np.array(orjson.loads(json_reply({"v": values}).body)["v"], np.float32)
    np.testing.assert_array_equal(read.view(np.uint32)[values != 0], values.view(np.uint32)[values != 0])


def test_packed_is_little_endian_in_c_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    content = packed(array)
    assert content["shape"] == (3, 2)
    assert np.frombuffer(base64.b64decode(content["data"]), "<f4").tolist() == [0, 3, 1, 4, 2, 5]


def test_errors_have_one_shape_and_their_headers() -> None:
    reply = error_reply(Overloaded("full", retry_after_s=7))
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "7")
    assert orjson.loads(reply.body) == {"error": {"code": "overloaded", "message": "full", "param": None}}
    assert error_reply(Unauthorized("no")).headers["www-authenticate"] == "Bearer"
    assert error_reply(PatchsightError("x", "k")).status_code == 500
