"""Encoders come, change and go while requests are answered.

New ones are loaded and run once beside the old ones, then all of them take their places in one step. A request keeps
what it took at its beginning; an encoder that is out of its place is given back once the last one that may hold it has
been answered. One that cannot be loaded leaves the old one in its place.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Self

from patchsight_serve import memory
from patchsight_serve.encoder import Encoder, RemoteEncoder
from patchsight_serve.errors import PatchsightError
from patchsight_serve.loaded import Loaded, with_engine
from patchsight_serve.manifest import Manifest
from patchsight_serve.service import PROOF_TIMEOUT_S, Service

logger = logging.getLogger(__name__)

# What there is to serve, by name, beside what is known of it: None where it is the same, else the encoder, or why it
# cannot be loaded. Called in a thread of its own. Raises PatchsightError where nothing can be said at all.
Found = Mapping[str, Encoder | RemoteEncoder | PatchsightError | None]
Source = Callable[[Mapping[str, Manifest]], Found]


class Reloader:
    """Looks after the engines of a service: entering starts them, leaving ends them, `request` has them looked over."""

    def __init__(self, service: Service, source: Source | None = None) -> None:
        self._service, self._source = service, source
        self._wanted = False
        self._task: asyncio.Task[None] | None = None
        self._giving_back: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for loaded in self._service.loaded.values():
                await stack.enter_async_context(loaded.engine)
            stack.pop_all()  # their places may be taken by others until the end
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._giving_back, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()  # of one that was giving back, the engines are ended all the same
        await asyncio.gather(*tasks, return_exceptions=True)
        for loaded in self._service.loaded.values():
            await loaded.engine.__aexit__(None, None, None)

    def request(self) -> None:
        """Have a reload done; one that is under way is followed by another, as it may have seen half of a change."""
        if self._source is None:
            logger.warning("there is nothing to reload from")
            return
        self._wanted = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work(self._source), name="reload")

    async def _work(self, source: Source) -> None:
        while self._wanted:
            self._wanted = False
            try:
                await self._reload(source)
            except Exception as error:
                self._service.metrics.reloads.labels("failed").inc()
                if isinstance(error, PatchsightError):
                    logger.error("nothing was reloaded: %s", error.message)
                else:
                    logger.exception("nothing was reloaded")

    async def _reload(self, source: Source) -> None:
        before = self._service.loaded
        found = await asyncio.to_thread(source, {name: loaded.manifest for name, loaded in before.items()})
        async with AsyncExitStack() as started:
            after, failed = await self._started(found, started)
            default = self._service.settings.encoder
            if default is not None and default not in after:
                failed.setdefault(default, "it is not there any more; it stays, as --encoder names it")
                after[default] = before[default]
            started.pop_all()
        self._place(after or before, failed)
        for name, why in failed.items():
            logger.error("encoder %s was not reloaded: %s", name, why)
        _tell(before, self._service.loaded)

    async def _started(self, found: Found, started: AsyncExitStack) -> tuple[dict[str, Loaded], dict[str, str]]:
        """What is to be in place, each engine at work, and what went wrong; new engines are in `started`."""
        service = self._service
        after: dict[str, Loaded] = {}
        failed: dict[str, str] = {}
        for name, entry in found.items():
            try:
                if isinstance(entry, PatchsightError):
                    raise entry
                if entry is not None:
                    after[name] = await self._prove(with_engine(entry, service.settings, service.metrics), started)
            except PatchsightError as error:
                failed[name] = error.message
            if name not in after and name in service.loaded:
                after[name] = service.loaded[name]
        return after, failed

    async def _prove(self, loaded: Loaded, started: AsyncExitStack) -> Loaded:
        """Run it once: the first inference is slow, and no user shall wait for it. Raises NotReady."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(loaded.engine)
            await loaded.engine.prove(0.0, max(PROOF_TIMEOUT_S, self._service.settings.timeout_s))
            started.push_async_exit(stack.pop_all())
        return loaded

    def _place(self, after: Mapping[str, Loaded], failed: Mapping[str, str]) -> None:
        """In one step, as far as any request can see."""
        service = self._service
        before, service.loaded, service.failed = service.loaded, dict(sorted(after.items())), dict(failed)
        service.metrics.reloads.labels("failed" if failed else "done").inc()
        service.watch_queues()
        for name in before.keys() - after.keys():
            service.metrics.forget_queue(name)
        gone = [loaded for loaded in before.values() if loaded not in after.values()]
        if gone:
            task = asyncio.create_task(self._give_back(gone), name="give back")
            self._giving_back.add(task)
            task.add_done_callback(self._giving_back.discard)

    async def _give_back(self, gone: list[Loaded]) -> None:
        try:
            # A request that came before holds an encoder while its body arrives, and while its images are encoded.
            await self._service.visits.over(timeout_s=3 * self._service.settings.timeout_s)
        finally:
            names = [f"{loaded.manifest.name} ({loaded.manifest.sha256:.12})" for loaded in gone]
            await _end(gone)
        memory.settle()
        await asyncio.to_thread(memory.give_back)
        logger.info("given back: %s", ", ".join(names))


async def _end(gone: list[Loaded]) -> None:
    """End their engines, and let go of them."""
    while gone:
        await gone.pop().engine.__aexit__(None, None, None)


def _tell(before: Mapping[str, Loaded], after: Mapping[str, Loaded]) -> None:
    def listed(names: Sequence[str]) -> str:
        return ", ".join(sorted(names)) or "none"

    kept = [name for name in after if name in before and after[name] is before[name]]
    changed = [name for name in after if name in before and after[name] is not before[name]]
    logger.info(
        "reloaded: added %s; replaced %s; removed %s; unchanged %s",
        listed([*(after.keys() - before.keys())]), listed(changed), listed([*(before.keys() - after.keys())]),
        listed(kept),
    )  # fmt: skip
    for name in changed:
        logger.info(
            "encoder %s: sha256 %.12s, was %.12s", name, after[name].manifest.sha256, before[name].manifest.sha256
        )
