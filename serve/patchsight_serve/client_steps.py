"""What a client does, as steps that something else takes: send a call, wait, work; and how a call is repeated."""

import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from patchsight_serve import errors
from patchsight_serve.errors import DeadlineExceeded, NotReady, Overloaded, PatchsightError

T = TypeVar("T")
JSON, NPY, RAW = "application/json", "application/x-npy", "application/octet-stream"
LONGEST_WAIT_S = 60
JITTER = 0.25  # of the wait, at most, on top of it: clients that were refused together must not come back together

_BY_CODE = {
    kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PatchsightError)
}


@dataclass(frozen=True)
class Call:
    """A request to send. Images go as a form, also where there is one of them."""

    method: str
    path: str
    query: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    accept: str = JSON
    images: Sequence[bytes] = ()
    fields: Mapping[str, str] = field(default_factory=dict)  # of the form, beside the images
    body: Path | None = None  # in place of images, of `size` bytes
    size: int = 0
    to: Path | None = None  # where a good reply's body goes, which is of type `accept`
    repeatable: bool = True  # asking twice does what asking once does

    def arguments(self) -> dict[str, Any]:
        """For httpx's `request`, but for the body that is a file."""
        files = [("images", (f"{i}", data, RAW)) for i, data in enumerate(self.images)]
        headers = {"Accept": self.accept}
        if self.body is not None:
            headers |= {"Content-Type": RAW, "Content-Length": str(self.size)}
        return {
            "method": self.method, "url": self.path, "params": self.query, "headers": headers, "files": files or None,
            "data": self.fields or None,
        }  # fmt: skip


@dataclass(frozen=True)
class Wait:
    """Seconds to let pass."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """What takes a thread a while."""

    do: Callable[[], object]


Step = Call | Wait | Work
Steps = Generator[Step, Any, T]


def ask(call: Call, url: str, patience_s: float, outage_s: float = 0.0) -> Steps[httpx.Response]:
    """A good reply. Repeats a call while the server is busy, for as long as `patience_s`; and once each if it is
    not ready or the connection breaks, or for as long as `outage_s`, and then after a deadline that passed, too.
    After a break nobody knows whether a call was heard: one that is not `repeatable` is then given up.

    Raises the server's error, PatchsightError if it cannot be reached.
    """
    end = time.monotonic() + patience_s
    outage = time.monotonic() + outage_s
    excused: set[object] = set()
    while True:
        try:
            reply: httpx.Response = yield call
        except httpx.HTTPError as error:
            broken = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
            lasting = "connection" in excused and time.monotonic() >= outage
            heard = not (call.repeatable or isinstance(error, httpx.ConnectError))
            if not broken or lasting or heard:
                raise PatchsightError(f"{url}: {str(error) or type(error).__name__}") from error
            wait = 1.0 if "connection" in excused else 0.2
            excused.add("connection")
        else:
            if reply.is_success:
                return reply
            now, status = time.monotonic(), reply.status_code
            busy = status == Overloaded.status and now < end
            out = status in (NotReady.status, DeadlineExceeded.status) and now < outage
            if not (busy or out) and (status != NotReady.status or NotReady.status in excused):
                raise _error_of(reply)
            excused.add(status)
            told = reply.headers.get("Retry-After", "1")
            wait = min(int(told), LONGEST_WAIT_S) if told.isdecimal() else 1.0
        yield Wait(wait * (1 + JITTER * random.random()))


def _error_of(reply: httpx.Response) -> PatchsightError:
    """The server's own words, or what came instead."""
    try:
        return named(**reply.json()["error"])
    except (ValueError, KeyError, TypeError):
        return PatchsightError(f"{reply.url}: status {reply.status_code} and no error of a patchsight server")


def named(code: str, message: str, param: str | None = None, **_: Any) -> PatchsightError:
    """An error as the server words it."""
    kind: type[PatchsightError] = _BY_CODE.get(code, PatchsightError)
    return kind(message) if kind is Overloaded else kind(message, param)
