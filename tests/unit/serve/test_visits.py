"""Who was here at a moment is waited for; who comes later is not."""

import asyncio

from patchsight_serve.visits import Visits


def test_those_who_are_here_are_waited_for_and_nobody_else() -> None:
    async def scenario() -> None:
        visits, doors = Visits(), [asyncio.Event() for _ in range(3)]

        async def visitor(door: asyncio.Event) -> None:
            with visits.visit():
                await door.wait()

        async with asyncio.timeout(20):
            await visits.over(60)  # nobody is here
            early = [asyncio.create_task(visitor(door)) for door in doors[:2]]
            await asyncio.sleep(0)
            over = asyncio.create_task(visits.over(60))
            await asyncio.sleep(0)
            late = asyncio.create_task(visitor(doors[2]))
            doors[0].set()
            await early[0]
            await asyncio.sleep(0.01)
            assert not over.done()
            early[1].cancel()  # a client that leaves has left, too
            await over
            assert not late.done()
            await visits.over(0.01)  # does not end by itself
            doors[2].set()
            await late
            await visits.over(60)

    asyncio.run(scenario())
