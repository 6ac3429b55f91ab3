"""Images that were damaged in a hundred ways: an array, or one of four errors; and they harm no image beside them."""

import base64
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st
from starlette.testclient import TestClient

from patchsight_serve.decode import Limits, decode
from patchsight_serve.errors import DamagedImage, InvalidRequest, TooLarge, UnsupportedImage
from patchsight_serve.manifest import Transform

Damaged = Callable[[dict[str, bytes]], st.SearchStrategy[bytes]]
TRANSFORM = Transform(resize=36, crop=32)
LIMITS = Limits(max_bytes=200_000, max_pixels=1_000_000)
CODES = {"invalid_request": 400, "too_large": 413, "unsupported_image": 415, "damaged_image": 422}


def test_good_images_are_good(good: dict[str, bytes]) -> None:
    """What is damaged was whole before: else the rest of this page would test less than it seems to."""
    for name, data in good.items():
        assert decode(data, TRANSFORM, LIMITS).std() > 10, name


def test_decode(fuzz: Callable[..., None], good: dict[str, bytes], damaged: Damaged) -> None:
    outcomes: dict[type, int] = {}

    def check(data: bytes) -> None:
        try:
            array = decode(data, TRANSFORM, LIMITS)
        except (InvalidRequest, TooLarge, UnsupportedImage, DamagedImage) as error:
            outcomes[type(error)] = outcomes.get(type(error), 0) + 1
        else:
            assert (array.shape, array.dtype, array.flags.c_contiguous) == ((32, 32, 3), np.uint8, True)
            outcomes[np.ndarray] = outcomes.get(np.ndarray, 0) + 1

    fuzz(damaged(good), check, few=1200, many=8000)
    assert {np.ndarray, TooLarge, UnsupportedImage, DamagedImage} <= set(outcomes)
    assert outcomes[np.ndarray] > 100, outcomes  # some damage is none to the pixels, or none that a reader can tell
    assert outcomes[DamagedImage] > 400, outcomes


def test_embed(fuzz: Callable[..., None], good: dict[str, bytes], damaged: Damaged, client: TestClient) -> None:
    """Beside damaged images, a good one has the same numbers as alone, whichever way they come."""
    alone = client.post("/embed", content=good["png"], headers={"Content-Type": "image/png"}).json()["results"][0]

    def check(case: tuple[list[bytes], bool]) -> None:
        bad, as_json = case
        images = [*bad, good["png"]]
        if as_json:
            reply = client.post("/embed", json={"images": [base64.b64encode(data).decode() for data in images]})
        else:
            reply = client.post("/embed", files=[("images", ("x", data)) for data in images])
        assert reply.status_code == 200, reply.text
        results = reply.json()["results"]
        assert [result["index"] for result in results] == list(range(len(images)))
        assert results[-1]["embedding"] == alone["embedding"]
        for index, (data, result) in enumerate(zip(bad, results, strict=False)):
            if "error" in result:
                assert result["error"]["code"] in CODES
                assert result["error"]["param"] == f"images[{index}]"
            else:
                assert len(result["embedding"]) == 16
            raw = client.post("/embed", content=data, headers={"Content-Type": "image/x"})
            assert raw.status_code == (CODES[result["error"]["code"]] if "error" in result else 200)

    fuzz(st.tuples(st.lists(damaged(good), min_size=1, max_size=3), st.booleans()), check, few=150, many=300)
