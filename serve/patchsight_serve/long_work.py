"""Work on a gallery as a whole, which takes seconds or minutes: in threads of its own, so that it takes none from the
requests that need one for a moment."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from patchsight_serve.gallery import Gallery

T = TypeVar("T")
P = ParamSpec("P")

THREADS = 2
LOOK_S = 0.05  # between two looks whether a long write is over


class LongWork:
    """Two threads; what comes beyond waits. Belongs to one event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="long work")

    async def run(self, work: Callable[[threading.Event], T]) -> T:
        """What `work` returns. The event it is given is set once nobody waits for that any more."""
        left = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, left)
        finally:
            left.set()

    def close(self) -> None:
        """Wait for what is at work; what has not begun never will."""
        self._pool.shutdown(cancel_futures=True)


async def short_write(gallery: Gallery, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a write of moments in a thread, but not while a long one is at work: it would wait there, and be missing to
    requests that only read."""
    while gallery.busy:
        await asyncio.sleep(LOOK_S)
    return await asyncio.to_thread(work, *args, **kwargs)
