"""What a client begins and does not finish comes to an end, and what is not HTTP is told so, over real sockets."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from patchsight_serve.connection import MAX_HEAD, MAX_PIPELINED, allow_open_files

HEADER_TIMEOUT, TIMEOUT, MOST = 1, 2, 24
PATIENCE = 30  # seconds for what should take about one of the two, on a busy machine
POST = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def url(strict_serve: Callable[[int, int, int], str]) -> str:
    return strict_serve(HEADER_TIMEOUT, TIMEOUT, MOST)


@pytest.fixture
def connect(url: str) -> Iterator[Callable[[], socket.socket]]:
    """`connect()`: a socket to the server, closed at the end."""
    sockets: list[socket.socket] = []

    def connect() -> socket.socket:
        sockets.append(socket.create_connection((httpx.URL(url).host, httpx.URL(url).port or 0), PATIENCE))
        return sockets[-1]

    yield connect
    for one in sockets:
        one.close()


def until_closed(connection: socket.socket) -> bytes:
    """All that the server says before it closes."""
    said = b""
    try:
        while data := connection.recv(65536):
            said += data
    except ConnectionResetError:
        pass  # it closed with some of ours unread
    return said


def answer(connection: socket.socket) -> bytes:
    """One reply, with all of its body, and the connection stays."""
    said = b""
    while b"\r\n\r\n" not in said:
        assert (data := connection.recv(1)), said
        said += data
    length = re.search(rb"content-length: (\d+)", said)
    assert length
    while len(said.partition(b"\r\n\r\n")[2]) < int(length[1]):
        said += connection.recv(1)
    return said


def error(said: bytes, status: int) -> dict[str, str]:
    """The one error that the server said before it closed."""
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), said
    assert b"connection: close" in head
    assert b"content-type: application/json" in head
    found: dict[str, str] = json.loads(body)["error"]
    return found


def refused(url: str, reason: str) -> float:
    found = re.search(
        rf'^patchsight_rejected_requests_total{{reason="{reason}"}} (\S+)$', httpx.get(f"{url}/metrics").text, re.M
    )
    return float(found[1]) if found else 0.0


def test_a_silent_connection_is_closed(connect: Callable[[], socket.socket]) -> None:
    assert until_closed(connect()) == b""


@pytest.mark.parametrize("begun", [b"G", GET, b"\r\n\r\n" + GET, POST + b"Content-Le"])
def test_a_head_that_stops_is_408(begun: bytes, url: str, connect: Callable[[], socket.socket]) -> None:
    before = refused(url, "request_timeout")
    connection = connect()
    connection.sendall(begun)
    assert error(until_closed(connection), 408)["code"] == "request_timeout"
    assert refused(url, "request_timeout") > before


def test_a_head_byte_by_byte_is_408(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.settimeout(0.1)
    said = b""
    for byte in GET + b"X: " + b"x" * 300:
        try:
            connection.sendall(bytes([byte]))
            said = connection.recv(65536)
        except TimeoutError:
            continue
        break
    assert error(said, 408)["message"] == "the request's head was not complete within 1 s"


def test_a_second_head_has_a_time_of_its_own(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(GET + b"\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 200")
    time.sleep(2 * HEADER_TIMEOUT)  # between requests a connection may rest
    connection.sendall(GET + b"\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 200")
    connection.sendall(GET)
    assert error(until_closed(connection), 408)


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (GET + b"X: ", b"x" * 1000),
        (b"GET /", b"x" * 1000),
        (GET, b"X: y\r\n" * 200),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"X: y\r\n" * 200),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n5;", b"x" * 1000),
    ],
)
def test_a_head_without_end_is_431(begin: bytes, more: bytes, connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    sent = connection.send(begin)
    try:
        while sent < 100 * MAX_HEAD:
            sent += connection.send(more)
    except (ConnectionResetError, BrokenPipeError):
        pass
    assert sent < 100 * MAX_HEAD
    said = until_closed(connection)
    assert not said or error(said, 431)["code"] == "head_too_large"  # what it said is lost if it closed on unread data


def test_the_limit_of_a_head(connect: Callable[[], socket.socket]) -> None:
    for length, status in ((MAX_HEAD - 200, b"200"), (MAX_HEAD + 10, b"431")):
        connection = connect()
        connection.sendall(GET + b"X: " + b"x" * length + b"\r\n\r\n")
        assert answer(connection).startswith(b"HTTP/1.1 " + status)


def test_blank_lines_without_end(connect: Callable[[], socket.socket]) -> None:
    connection = connect()

    def send() -> None:
        for _ in range(10_000):
            connection.sendall(b"\r\n" * 1000)

    pytest.raises((ConnectionResetError, BrokenPipeError), send)


@pytest.mark.parametrize(
    "wire",
    [
        b"\x16\x03\x01 not http\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        POST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc",
    ],
)
def test_what_is_not_http_is_400(wire: bytes, connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(wire)
    assert error(until_closed(connection), 400)["code"] == "invalid_request"


def test_an_upgrade_is_not_taken(connect: Callable[[], socket.socket]) -> None:
    for asked in (b"websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==", b"h2c"):
        connection = connect()
        connection.sendall(GET + b"Connection: Upgrade\r\nUpgrade: " + asked + b"\r\n\r\n")
        said = until_closed(connection)
        assert said.startswith(b"HTTP/1.1 200")
        assert said.count(b"HTTP/1.1") == 1


def test_pipelined_requests_are_answered_in_order(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    ids = [f"r{i}" for i in range(MAX_PIPELINED)]
    wire = b"".join(GET + f"X-Request-ID: {i}\r\n\r\n".encode() for i in ids)
    connection.sendall(wire[:-2] + b"Connection: close\r\n\r\n")
    said = until_closed(connection).decode()
    assert re.findall(r"x-request-id: (\w+)", said) == ids
    assert said.count("HTTP/1.1 200") == len(ids)


def test_pipelined_requests_do_not_pile_up(url: str, connect: Callable[[], socket.socket]) -> None:
    before = refused(url, "invalid_request")
    connection = connect()
    connection.sendall((GET + b"\r\n") * 1000)
    said = until_closed(connection)
    assert said.count(b"HTTP/1.1") < 1000
    assert b"HTTP/1.1 400" not in said  # it would be taken for the answer of another request
    assert refused(url, "invalid_request") > before


def test_trailers_are_no_headers(connect: Callable[[], socket.socket], png: bytes) -> None:
    connection = connect()
    body = b"%x\r\n%b\r\n0\r\nX-Request-ID: late\r\n\r\n" % (len(png), png)
    connection.sendall(POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    said = until_closed(connection)
    assert said.startswith(b"HTTP/1.1 200")
    assert b"late" not in said


def test_an_early_answer_without_100_ends_the_connection(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(POST.replace(b"image/png", b"text/x") + b"Expect: 100-continue\r\nContent-Length: 99\r\n\r\n")
    said = until_closed(connection)
    assert said.startswith(b"HTTP/1.1 415")
    assert b"connection: close" in said


def test_the_connection_lives_on_after_an_early_answer(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(POST.replace(b"image/png", b"text/x") + b"Content-Length: 99\r\n\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 415")
    connection.sendall(b"x" * 99 + GET + b"\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 200")


def test_a_body_that_drips_after_its_answer_ends(connect: Callable[[], socket.socket]) -> None:
    connection = connect()
    connection.sendall(POST.replace(b"image/png", b"text/x") + b"Content-Length: 9999\r\n\r\n")
    assert answer(connection).startswith(b"HTTP/1.1 415")

    def drip() -> None:
        for _ in range(10 * PATIENCE):
            connection.sendall(b"x")
            time.sleep(0.1)

    pytest.raises((ConnectionResetError, BrokenPipeError), drip)


def test_a_reply_that_nobody_reads_is_dropped(url: str, connect: Callable[[], socket.socket]) -> None:
    before = refused(url, "reply_not_read")
    connection = connect()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    large = b"GET /static/swagger/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    connection.sendall(large * MAX_PIPELINED)  # more than the kernel takes off our hands
    for _ in range(10 * PATIENCE):
        if refused(url, "reply_not_read") > before:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("it still waits")


def test_a_reply_that_is_read_slowly_arrives(url: str, connect: Callable[[], socket.socket]) -> None:
    whole = httpx.get(f"{url}/static/swagger/swagger-ui-bundle.js").content
    connection = connect()
    large = b"GET /static/swagger/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n"
    times = 1 + 11_000_000 // len(whole)
    connection.sendall((large + b"\r\n") * (times - 1) + large + b"Connection: close\r\n\r\n")
    said, start = [], time.monotonic()
    while data := connection.recv(500_000):
        said.append(data)
        time.sleep(0.2 * len(data) / 500_000)  # 2.5 MB a second
    assert time.monotonic() - start > 1.5 * TIMEOUT
    assert b"".join(said).count(whole) == times


def test_connections_over_the_limit(url: str, connect: Callable[[], socket.socket]) -> None:
    held = [connect() for _ in range(MOST)]
    for connection in held:
        connection.sendall(GET + b"\r\n")
    assert all(answer(connection).startswith(b"HTTP/1.1 200") for connection in held)
    late = connect()
    said = until_closed(late)
    assert error(said, 503)["code"] == "too_many_connections"
    assert b"retry-after: 1\r\n" in said.lower()
    held[0].sendall(GET + b"\r\n")  # those who are in stay in
    assert answer(held[0]).startswith(b"HTTP/1.1 200")
    for connection in held:
        connection.close()
    for _ in range(10 * PATIENCE):
        if re.search(r"^patchsight_connections 1.0$", httpx.get(f"{url}/metrics").text, re.MULTILINE):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("connections that are gone still count")
    assert refused(url, "too_many_connections") >= 1


def test_open_files_suffice() -> None:
    """As many as the hard limit allows, and never fewer than before."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, before[0]), before[1]))
        assert allow_open_files(100) == 356
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (356, before[1])
        assert allow_open_files(10) == 266
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (356, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
