"""The queue: every image gets its own result, whatever happens to the others, and the worker never stops unnoticed."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from patchsight_serve.batcher import Batcher
from patchsight_serve.engine import Result
from patchsight_serve.errors import DeadlineExceeded, NotReady, Overloaded, PatchsightError
from patchsight_serve.fake_encoder import FakeEncoder
from patchsight_serve.timing import Timing

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
    batcher: Batcher, images: Sequence[np.ndarray], outputs: Sequence[str], timeout_s: float
) -> tuple[list[Result], Timing]:
    """What a request does: hold places, and be encoded in time."""
    async with batcher.admit(len(images), timeout_s):
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
            assert len(batcher._queue) == 0
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
