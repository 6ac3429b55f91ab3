"""Surveys: one at a time beside searches and writers, answers kept while true, work ended that is for nobody."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from patchsight_serve.embedded_gallery import EmbeddedGallery as Gallery
from patchsight_serve.errors import NotReady, Overloaded
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import normalize
from patchsight_serve.survey import KEPT, WAITING, Surveys

ENCODER = Identity("vit", "a" * 64)
VECTORS = normalize(np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32))


def new(i: int, data: bytes = b"", label: str | None = None) -> NewImage:
    return NewImage(Item(f"i{i:02d}", label), data or str(i).encode(), b"thumb", VECTORS[i])


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    opened = Gallery(tmp_path / "default")
    opened.add([new(i) for i in range(20)], ENCODER)
    yield opened
    opened.close()


@pytest.fixture
def surveys() -> Iterator[Surveys]:
    made = Surveys()
    yield made
    made.close()


class Counting:
    """Work that gives the keys' number, and counts how often it was done."""

    times = 0

    def __call__(self, keys, vectors, pause) -> int:
        self.times += 1
        assert vectors.shape == (len(keys), 16)
        pause()
        return len(keys)


class Hanging:
    """Work that goes on until it is let go, or its pause ends it."""

    def __init__(self) -> None:
        self.begun, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, *given) -> str:
        *_, pause = given
        self.begun.set()
        try:
            while not self.go.wait(0.01):
                pause()
        finally:
            self.ended.set()
        return "done"

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, 60)


def test_an_answer_is_kept_until_an_image_comes_goes_or_changes(gallery: Gallery, surveys: Surveys) -> None:
    async def scenario() -> None:
        work = Counting()

        async def ask(expected: int, times: int) -> None:
            assert await surveys.ask(gallery, "how many", work) == expected
            assert work.times == times

        await ask(20, 1)
        await ask(20, 1)
        gallery.patch("i03", {"label": "x"})
        await ask(20, 1)
        gallery.add([new(20)], ENCODER)
        await ask(21, 2)
        gallery.delete("i05")
        await ask(20, 3)
        gallery.add([new(6, b"other")], ENCODER, replace=True)
        await ask(20, 4)
        assert await surveys.ask(gallery, "another question", work) == 20
        assert work.times == 5
        await ask(20, 5)

    asyncio.run(scenario())


def test_galleries_of_the_same_keys_are_not_confused(gallery: Gallery, surveys: Surveys, tmp_path: Path) -> None:
    """As where one is put in the place of another."""
    other = Gallery(tmp_path / "elsewhere" / "default")
    other.add([new(i + 20) for i in range(20)], ENCODER)
    assert np.array_equal(gallery.keys(), other.keys())

    async def scenario() -> None:
        first = await surveys.ask(gallery, "vectors", lambda *given: given[1])
        second = await surveys.ask(other, "vectors", lambda *given: given[1])
        assert np.array_equal(first, VECTORS[:20])
        assert np.array_equal(second, VECTORS[20:40])

    asyncio.run(scenario())
    other.close()


def test_only_the_newest_answers_are_kept(gallery: Gallery, surveys: Surveys) -> None:
    async def scenario() -> None:
        work = Counting()
        for question in range(KEPT + 1):
            await surveys.ask(gallery, question, work)
        await surveys.ask(gallery, 1, work)
        assert work.times == KEPT + 1
        await surveys.ask(gallery, 0, work)
        assert work.times == KEPT + 2

    asyncio.run(scenario())


def test_searches_and_writers_go_on_beside_it(gallery: Gallery, surveys: Surveys) -> None:
    async def scenario() -> None:
        work = Hanging()
        asked = asyncio.create_task(surveys.ask(gallery, "long", work))
        await work.has_begun()
        assert (await asyncio.to_thread(gallery.neighbors, VECTORS[3], 1))[0].id == "i03"
        assert await asyncio.to_thread(gallery.add, [new(21)], ENCODER) == [True]
        await asyncio.to_thread(gallery.delete, "i02")
        assert not asked.done()
        work.go.set()
        assert await asked == "done"

    asyncio.run(scenario())


def test_one_at_a_time_and_the_same_question_is_worked_on_once(gallery: Gallery, surveys: Surveys) -> None:
    async def scenario() -> None:
        first, second = Hanging(), Counting()
        one = asyncio.create_task(surveys.ask(gallery, "long", first))
        await first.has_begun()
        others = [asyncio.create_task(surveys.ask(gallery, "same", second)) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert second.times == 0
        first.go.set()
        assert await one == "done"
        assert await asyncio.gather(*others) == [20, 20, 20]
        assert second.times == 1

    asyncio.run(scenario())


def test_work_that_nobody_waits_for_ends(gallery: Gallery, surveys: Surveys) -> None:
    async def scenario() -> None:
        running, queued = Hanging(), Counting()
        one = asyncio.create_task(surveys.ask(gallery, "long", running))
        await running.has_begun()
        two = asyncio.create_task(surveys.ask(gallery, "queued", queued))
        await asyncio.sleep(0.1)
        two.cancel()
        one.cancel()
        assert await asyncio.to_thread(running.ended.wait, 60)
        work = Counting()
        assert await surveys.ask(gallery, "after", work) == 20
        assert queued.times == 0

    asyncio.run(scenario())


def test_too_many_are_refused_and_what_is_kept_is_not(gallery: Gallery, surveys: Surveys) -> None:
    async def scenario() -> None:
        assert await surveys.ask(gallery, "kept", Counting()) == 20
        running = Hanging()
        tasks = [asyncio.create_task(surveys.ask(gallery, "long", running))]
        await running.has_begun()
        tasks += [asyncio.create_task(surveys.ask(gallery, f"q{i}", Counting())) for i in range(WAITING - 1)]
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded, match=f"the limit is {WAITING}"):
            await surveys.ask(gallery, "one more", Counting())
        assert await surveys.ask(gallery, "kept", Counting()) == 20
        running.go.set()
        assert await asyncio.gather(*tasks) == ["done"] + [20] * (WAITING - 1)
        assert await surveys.ask(gallery, "one more", Counting()) == 20

    asyncio.run(scenario())


def test_closing_ends_the_work(gallery: Gallery) -> None:
    async def scenario() -> None:
        surveys, work = Surveys(), Hanging()
        asked = asyncio.create_task(surveys.ask(gallery, "long", work))
        await work.has_begun()
        await asyncio.to_thread(surveys.close)
        with pytest.raises(NotReady, match="leaving"):
            await asked

    asyncio.run(scenario())


def test_an_error_is_the_askers_and_is_not_kept(gallery: Gallery, surveys: Surveys) -> None:
    def broken(*_):
        raise ValueError("broken")

    async def scenario() -> None:
        with pytest.raises(ValueError, match="broken"):
            await surveys.ask(gallery, "q", broken)
        assert await surveys.ask(gallery, "q", Counting()) == 20

    asyncio.run(scenario())
