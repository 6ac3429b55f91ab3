"""A real server on a real socket, in a thread of the test's own process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def on_socket(app: Any, log_level: str = "error") -> Iterator[str]:
    """The URL of an ASGI application that runs during the block."""
    # Its own configuration of logging would close the streams of whoever has set up theirs before.
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level=log_level, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
