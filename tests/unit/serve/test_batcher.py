"""The queue: every image gets its own result, whatever happens to the others, and the worker never stops unnoticed."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from patchsight_serve.batcher import Batcher
from patchsight_serve.errors import DeadlineExceeded, NotReady, Overloaded, PatchsightError
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.timing import Timing
from patchsight_serve.waiting import Result

POISON, FATAL = 13, 14  # value of the first pixel


class Gated(FakeEncoder):
    """A fake that waits for a gate, fails on poison, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__(image_size=8)
        self.gate = threading.Event()
        self.gate.set()
        self.busy = threading.Event()
        self.batches: list[tuple[int, list[str]]] = []

    def run(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        self.busy.set()
        assert self.gate.wait(60)
        self.batches.append((len(images), list(outputs)))
        if (images[:, 0, 0, 0] == POISON).any():
            raise RuntimeError("poison")
        if (images[:, 0, 0, 0] == FATAL).any():
            raise SystemExit
        return super().run(images, outputs)


def picture(first: int) -> np.ndarray:
    image = np.arange(8 * 8 * 3).reshape(8, 8, 3).astype(np.uint8)
    image[0, 0, 0] = first
    return image


def expected(image: np.ndarray, name: str = "cls_embedding") -> np.ndarray:
    return FakeEncoder(image_size=8).run(image[None], [name])[name][0]


async def submit(
    batcher: Batcher, images: Sequence[np.ndarray], outputs: Sequence[str], timeout_s: float, bulk: bool = False
) -> tuple[list[Result], Timing]:
    """What a request does: hold places, and be encoded in time."""
    async with batcher.admit(len(images), timeout_s, bulk):
        return await batcher.run(images, outputs)


async def occupy(batcher: Batcher, encoder: Gated) -> "asyncio.Task[object]":
    """Start one image, and return once it is in the encoder, whose gate is closed."""
    encoder.gate.clear()
    encoder.busy.clear()
    task = asyncio.create_task(submit(batcher, [picture(0)], ["cls_embedding"], 60))
    await asyncio.to_thread(encoder.busy.wait, 60)
    return task


def test_results_come_back_to_the_image_they_belong_to() -> None:
    async def main() -> None:
        async with Batcher(FakeEncoder(image_size=8), max_batch=3) as batcher:
            requests = [[picture(10 * r + i) for i in range(r % 4)] for r in range(20)]
            answers = await asyncio.gather(*(submit(batcher, r, ["cls_embedding"], 60) for r in requests))
        for request, (results, _) in zip(requests, answers, strict=True):
            assert len(results) == len(request)
            for image, result in zip(request, results, strict=True):
                assert not isinstance(result, PatchsightError)
                np.testing.assert_array_equal(result["cls_embedding"], expected(image))

    asyncio.run(main())


def test_what_waits_is_one_batch_up_to_the_limit_and_outputs_may_differ() -> None:
    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder, max_batch=4) as batcher:
            first = await occupy(batcher, encoder)
            wants = ["cls_embedding", "attention", "cls_embedding", "mean_embedding", "cls_embedding"]
            others = [asyncio.create_task(submit(batcher, [picture(i)], [name], 60)) for i, name in enumerate(wants)]
            await asyncio.sleep(0)
            encoder.gate.set()
            await first
            for i, (name, task) in enumerate(zip(wants, others, strict=True)):
                (result,), _ = await task
                assert not isinstance(result, PatchsightError)
                assert list(result) == [name]
                np.testing.assert_array_equal(result[name], expected(picture(i), name))
        assert encoder.batches == [
            (1, ["cls_embedding"]),
            (4, ["cls_embedding", "attention", "mean_embedding"]),
            (1, ["cls_embedding"]),
        ]

    asyncio.run(main())


def test_admission_counts_images_and_is_all_or_nothing() -> None:
    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder, max_queue=4) as batcher:
            first = await occupy(batcher, encoder)
            with pytest.raises(Overloaded, match="1 images are in work, 4 more would pass the limit of 4") as caught:
                await submit(batcher, [picture(i) for i in range(4)], ["cls_embedding"], 60)
            assert caught.value.retry_after_s >= 1
            assert batcher.admitted == 1
            second = asyncio.create_task(submit(batcher, [picture(i) for i in range(3)], ["cls_embedding"], 60))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await submit(batcher, [picture(0)], ["cls_embedding"], 60)
            encoder.gate.set()
            await asyncio.gather(first, second)
            assert batcher.admitted == 0
            await submit(batcher, [picture(i) for i in range(4)], ["cls_embedding"], 60)

    asyncio.run(main())


def test_a_poisonous_image_fails_alone() -> None:
    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder) as batcher:
            images = [picture(1), picture(POISON), picture(3)]
            results, _ = await submit(batcher, images, ["cls_embedding"], 60)
            good, bad, other = results
            assert isinstance(bad, PatchsightError)
            assert (bad.status, bad.code) == (500, "internal")
            assert "poison" not in bad.message
            for image, result in ((images[0], good), (images[2], other)):
                assert not isinstance(result, PatchsightError)
                np.testing.assert_array_equal(result["cls_embedding"], expected(image))
            await batcher.prove(max_age_s=60, timeout_s=10)

    asyncio.run(main())


def test_the_worker_survives_what_is_no_exception() -> None:
    async def main() -> None:
        async with Batcher(Gated()) as batcher:
            (result,), _ = await submit(batcher, [picture(FATAL)], ["cls_embedding"], 60)
            assert isinstance(result, PatchsightError)
            assert batcher.alive
            (result,), _ = await submit(batcher, [picture(1)], ["cls_embedding"], 60)
            assert not isinstance(result, PatchsightError)

    asyncio.run(main())


def test_a_deadline_frees_the_places_and_the_encoder_never_sees_the_image() -> None:
    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder, max_queue=2) as batcher:
            first = await occupy(batcher, encoder)
            with pytest.raises(DeadlineExceeded):
                await submit(batcher, [picture(1)], ["cls_embedding"], 0.01)
            assert batcher.admitted == 1
            encoder.gate.set()
            await first
            await submit(batcher, [picture(2), picture(3)], ["attention"], 10)
        assert encoder.batches == [(1, ["cls_embedding"]), (2, ["attention"])]

    asyncio.run(main())


def test_abandoned_images_do_not_pile_up_behind_an_encoder_that_hangs() -> None:
    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder, max_queue=2) as batcher:
            first = await occupy(batcher, encoder)
            for _ in range(50):
                with pytest.raises(DeadlineExceeded):
                    await submit(batcher, [picture(1)], ["cls_embedding"], 0.001)
            assert len(batcher._waiting) == 0
            encoder.gate.set()
            await first

    asyncio.run(main())


def test_leaving_answers_what_is_queued() -> None:
    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder, max_batch=1) as batcher:
            first = await occupy(batcher, encoder)
            others = [asyncio.create_task(submit(batcher, [picture(i)], ["cls_embedding"], 60)) for i in range(3)]
            await asyncio.sleep(0)
            encoder.gate.set()
        assert not batcher.alive
        results = await asyncio.gather(first, *others)
        assert len(results) == 4
        with pytest.raises(NotReady):
            await submit(batcher, [picture(1)], ["cls_embedding"], 60)

    asyncio.run(main())


def test_readiness_is_proven_by_inference_once_for_many() -> None:
    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder) as batcher:
            await asyncio.gather(*(batcher.prove(60, 10) for _ in range(20)))
            assert len(encoder.batches) == 1
            await batcher.prove(0, 10)  # too old at once
            assert len(encoder.batches) == 2
        with pytest.raises(NotReady, match="not running"):
            await batcher.prove(0, 10)

    asyncio.run(main())


def test_readiness_is_denied_while_the_encoder_hangs_or_fails() -> None:
    class Broken(Gated):
        broken = True

        def run(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
            if self.broken:
                raise RuntimeError("no memory on the device")
            return super().run(images, outputs)

    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder) as batcher:
            first = await occupy(batcher, encoder)
            with pytest.raises(NotReady, match="did not answer within 0.01 s"):
                await batcher.prove(60, 0.01)
            encoder.gate.set()
            await first
        broken = Broken()
        async with Batcher(broken) as batcher:
            with pytest.raises(NotReady):
                await batcher.prove(60, 10)
            broken.broken = False
            await batcher.prove(60, 10)
            broken.broken = True
            await submit(batcher, [picture(1)], ["cls_embedding"], 60)
            with pytest.raises(NotReady):  # though an inference succeeded a moment ago
                await batcher.prove(60, 10)

    asyncio.run(main())


def test_times_of_a_request() -> None:
    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder, max_batch=1) as batcher:
            first = await occupy(batcher, encoder)
            waiting = asyncio.create_task(submit(batcher, [picture(1), picture(2)], ["cls_embedding"], 60))
            await asyncio.sleep(0.05)
            encoder.gate.set()
            await first
            _, timing = await waiting
        assert timing.queue >= 0.05
        assert 0 < timing.infer < 10
        assert timing.decode == 0

    asyncio.run(main())


def test_sizes_of_batches_are_reported() -> None:
    async def main() -> list[int]:
        sizes: list[int] = []
        async with Batcher(FakeEncoder(image_size=8), max_batch=2, on_batch=sizes.append) as batcher:
            await submit(batcher, [picture(i) for i in range(5)], ["cls_embedding"], 60)
        return sizes

    assert asyncio.run(main()) == [2, 2, 1]


def test_interactive_images_go_before_bulk_which_never_starves() -> None:
    """Twelve images of bulk work wait, then twelve of others come: three of those for each of bulk."""

    async def main() -> list[int]:
        encoder = Gated()
        order: list[int] = []
        async with Batcher(encoder, max_batch=1) as batcher:
            first = await occupy(batcher, encoder)

            async def one(number: int, bulk: bool) -> None:
                await submit(batcher, [picture(number)], ["cls_embedding"], 60, bulk)
                order.append(number)

            tasks = [asyncio.create_task(one(100 + i, bulk=True)) for i in range(12)]
            await asyncio.sleep(0)
            tasks += [asyncio.create_task(one(200 + i, bulk=False)) for i in range(12)]
            await asyncio.sleep(0)
            encoder.gate.set()
            await asyncio.gather(first, *tasks)
        return order

    expected = []
    for i in range(4):
        expected += [200 + 3 * i, 201 + 3 * i, 202 + 3 * i, 100 + i]
    assert asyncio.run(main()) == expected + [104 + i for i in range(8)]


def test_bulk_work_leaves_places_for_others() -> None:
    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder, max_queue=8) as batcher:
            first = await occupy(batcher, encoder)
            bulk = [asyncio.create_task(submit(batcher, [picture(i)] * 3, ["cls_embedding"], 60, True)) for i in (1, 2)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="6 images of bulk work are in work, 1 more would pass the limit of 6"):
                await submit(batcher, [picture(9)], ["cls_embedding"], 60, True)
            other = asyncio.create_task(submit(batcher, [picture(3)], ["cls_embedding"], 60))
            await asyncio.sleep(0)
            assert batcher.admitted == 8
            encoder.gate.set()
            await asyncio.gather(first, *bulk, other)
            await submit(batcher, [picture(i) for i in range(8)], ["cls_embedding"], 60, True)  # alone it may have all

    asyncio.run(main())


def test_a_wait_that_would_be_too_long_is_refused_at_once() -> None:
    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder, max_wait_s=1.0) as batcher:
            await submit(batcher, [picture(1)], ["cls_embedding"], 60)
            assert batcher.pace.seconds_per_image is None  # the first one warms up, and says nothing
            first = await occupy(batcher, encoder)
            await asyncio.sleep(0.3)
            encoder.gate.set()
            await first
            assert (batcher.pace.seconds_per_image or 0) >= 0.3
            first = await occupy(batcher, encoder)
            others = [asyncio.create_task(submit(batcher, [picture(i)], ["cls_embedding"], 60)) for i in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(
                Overloaded, match=r"4 images are in work, which would take .* s; the limit is 1 s"
            ) as no:
                await submit(batcher, [picture(1)], ["cls_embedding"], 60)
            assert no.value.retry_after_s >= 2
            encoder.gate.set()
            await asyncio.gather(first, *others)

    asyncio.run(main())


def test_a_batch_that_never_ends_is_noticed() -> None:
    """Those in it are told that time is up, those behind it and those who come later that the encoder hangs."""

    async def main() -> None:
        encoder = Gated()
        async with Batcher(encoder, batch_timeout_s=0.3) as batcher:
            await batcher.prove(60, 10)
            inside = await occupy(batcher, encoder)
            behind = asyncio.create_task(submit(batcher, [picture(1)], ["cls_embedding"], 60))
            async with asyncio.timeout(10):
                with pytest.raises(DeadlineExceeded, match=r"did not finish a batch within 0.3 s"):
                    await inside
                with pytest.raises(NotReady, match="hangs"):
                    await behind
            assert batcher.hung
            with pytest.raises(NotReady):
                await batcher.prove(60, 10)  # though an inference succeeded a moment ago
            with pytest.raises(NotReady):
                await submit(batcher, [picture(2)], ["cls_embedding"], 60)
        encoder.gate.set()  # left without waiting for it

    asyncio.run(main())


def test_a_worker_that_cannot_go_on_is_not_ready_until_it_can() -> None:
    class Broken(Gated):
        broken = False

        def run(self, images: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
            if self.broken:
                raise SystemExit  # not even an Exception
            return super().run(images, outputs)

    async def main() -> None:
        encoder = Broken()
        async with Batcher(encoder) as batcher:
            await batcher.prove(60, 10)
            encoder.broken = True
            (result,), _ = await submit(batcher, [picture(1)], ["cls_embedding"], 60)
            assert isinstance(result, PatchsightError)
            with pytest.raises(NotReady):
                await batcher.prove(60, 1)
            encoder.broken = False
            await batcher.prove(60, 10)
            (result,), _ = await submit(batcher, [picture(1)], ["cls_embedding"], 60)
            assert not isinstance(result, PatchsightError)

    asyncio.run(main())
