"""Both clients of a server behind one face, so that one test asks both."""

import asyncio
import inspect
from typing import Any

import pytest

from patchsight_serve.client import AsyncClient, Client


class InLoop:
    """`AsyncClient` with the face of `Client`."""

    def __init__(self, url: str, key: str | None = None, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self._talk = None
        try:
            self.client = AsyncClient(url, key, **options)
            self.runner.run(self.client.__aenter__())
        except BaseException:
            self.runner.close()
            raise
        self._talk = self.client._talk

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.client, name)
        if not callable(value):
            return value

        async def all_of(results: Any) -> list[Any]:
            return [result async for result in results]

        def asked(*args: Any, **query: Any) -> Any:
            called = value(*args, **query)
            return self.runner.run(called if inspect.iscoroutine(called) else all_of(called))

        return asked

    def __enter__(self) -> "InLoop":
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.run(self.client.close())
        self.runner.close()


both = pytest.mark.parametrize("kind", [Client, InLoop])
