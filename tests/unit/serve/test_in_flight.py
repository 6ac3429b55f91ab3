"""Equal work under way at the same time is done once, and nobody suffers from another's failure."""

import asyncio
from collections.abc import Callable, Sequence

import pytest
from starlette.testclient import TestClient

from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.in_flight import SAMPLE, Content, InFlight


class Squares:
    """Computes x² for numbers, once its gate is open; keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.gate = asyncio.Event()

    async def run(self, flight: InFlight[int, int], numbers: Sequence[int]) -> list[int]:
        async def work(indices: Sequence[int]) -> list[int]:
            self.asked.append([numbers[i] for i in indices])
            await self.gate.wait()
            return [numbers[i] ** 2 for i in indices]

        return await flight.run(numbers, work)


def test_each_number_is_computed_once_whoever_asks() -> None:
    async def main() -> None:
        flight, squares = InFlight[int, int](), Squares()
        tasks = [asyncio.create_task(squares.run(flight, n)) for n in ([1, 2, 1], [2, 3], [3, 1, 2], [])]
        await asyncio.sleep(0.01)
        squares.gate.set()
        assert await asyncio.gather(*tasks) == [[1, 4, 1], [4, 9], [9, 1, 4], []]
        assert squares.asked == [[1, 2], [3]]
        assert await squares.run(flight, [1]) == [1]  # nothing is kept once it is done
        assert squares.asked[2:] == [[1]]

    asyncio.run(main())


def test_who_waits_for_somebody_that_leaves_does_it_alone() -> None:
    async def main() -> None:
        flight, squares = InFlight[int, int](), Squares()
        owner = asyncio.create_task(squares.run(flight, [1, 2]))
        await asyncio.sleep(0)
        others = [asyncio.create_task(squares.run(flight, [2, 3])) for _ in range(2)]
        leaver = asyncio.create_task(squares.run(flight, [1]))
        await asyncio.sleep(0.01)
        leaver.cancel()  # who merely waits may leave, too
        await asyncio.sleep(0)
        assert not owner.done()
        owner.cancel()
        with pytest.raises(asyncio.CancelledError):
            await owner
        await asyncio.sleep(0.01)
        squares.gate.set()
        assert await asyncio.gather(*others) == [[4, 9], [4, 9]]
        assert squares.asked[:3] == [[1, 2], [3], [2]]  # 2 once more where its second owner was done too soon

    asyncio.run(main())


def test_what_fails_for_one_is_tried_by_the_others() -> None:
    async def main() -> None:
        flight = InFlight[int, int]()
        calls = 0

        async def work(indices: Sequence[int]) -> list[int]:
            nonlocal calls
            calls += 1
            mine = calls
            await asyncio.sleep(0)
            if mine == 1:
                raise TimeoutError
            return [7 for _ in indices]

        first, second = (asyncio.create_task(flight.run([1], work)) for _ in range(2))
        with pytest.raises(TimeoutError):
            await first
        assert await second == [7]

    asyncio.run(main())


def test_contents_are_equal_only_if_all_bytes_are() -> None:
    data = bytes(range(256)) * 100
    assert Content(data) == Content(bytes(data))
    assert hash(Content(data)) == hash(Content(bytes(data)))
    other = bytearray(data)
    other[3 * SAMPLE] ^= 1  # where no sample is taken
    assert hash(Content(bytes(other))) == hash(Content(data))
    assert Content(bytes(other)) != Content(data)
    assert Content(b"") == Content(b"")
    assert Content(b"a") != b"a"


class Counting(FakeEncoder):
    images = 0

    def run(self, images, outputs):  # type: ignore[no-untyped-def]
        self.images += len(images)
        return super().run(images, outputs)


def test_copies_within_a_request_cost_one_inference(
    serving: Callable[..., TestClient], png: bytes, bad_images: dict[str, tuple[bytes, int, str]]
) -> None:
    encoder = Counting()
    client = serving(encoder)
    client.get("/readyz")
    before = encoder.images
    bad, _, code = bad_images["truncated"]
    files = [("images", data) for data in (png, bad, png, bad, png)]
    results = client.post("/embed", files=files).json()["results"]
    assert encoder.images == before + 1
    assert results[0]["embedding"] == results[2]["embedding"] == results[4]["embedding"]
    assert [results[i]["error"]["param"] for i in (1, 3)] == ["images[1]", "images[3]"]
    assert results[1]["error"]["code"] == code
    # Other outputs are other work.
    both = client.post("/embed?outputs=cls,mean", content=png, headers={"Content-Type": "image/png"}).json()
    assert both["results"][0]["cls"] == results[0]["embedding"]
    assert encoder.images == before + 2


def test_an_error_that_two_share_is_each_one_s_own(
    serving: Callable[..., TestClient], bad_images: dict[str, tuple[bytes, int, str]]
) -> None:
    """Whoever asked says where in its request the image was: the other must not read that."""
    client = serving()
    service = client.app.state.service  # type: ignore[attr-defined]
    bad, _, code = bad_images["truncated"]

    async def both() -> list[list[object]]:
        return await asyncio.gather(service.embed_images([bad, bad]), service.embed_images([bad]))

    assert client.portal is not None
    (one, two), (three,) = client.portal.call(both)
    assert {error.code for error in (one, two, three)} == {code}
    one.param = "images[0]"
    assert (two.param, three.param) == (None, None)
