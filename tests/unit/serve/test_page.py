"""The page's files and headers; tests/browser has what it does."""

import re
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from patchsight_serve.page import WEB


def policy(client: TestClient, path: str) -> dict[str, list[str]]:
    """The Content-Security-Policy's sources by directive."""
    header = client.get(path).headers["content-security-policy"]
    return {name: sources for name, *sources in (part.split() for part in header.split(";"))}


@pytest.mark.parametrize(("path", "pictures"), [("/", []), ("/docs", ["data:"])])
def test_policy_lets_only_this_server_in(path: str, pictures: list[str], client: TestClient) -> None:
    directives = policy(client, path)
    assert directives["default-src"] == ["'none'"]
    for name in ("script-src", "style-src", "connect-src"):
        assert directives[name] == ["'self'"]
    assert directives["img-src"] == ["'self'", "blob:", *pictures]
    for name in ("base-uri", "form-action", "frame-ancestors"):
        assert directives[name] == ["'none'"]


def test_on_the_page_no_text_becomes_html(client: TestClient) -> None:
    directives = policy(client, "/")
    assert directives["trusted-types"] == ["'none'"]
    assert directives["require-trusted-types-for"] == ["'script'"]


def test_headers_of_the_page_and_its_files(client: TestClient) -> None:
    for name in ("", "docs", "static/index.html", "static/page.js", "static/docs.js", "static/page.css"):
        path = f"/{name}"
        reply = client.get(path)
        assert reply.status_code == 200
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["cache-control"] == "no-cache"
        assert ("content-security-policy" in reply.headers) == (path in ("/", "/docs", "/static/index.html"))
    for path in ("/", "/docs"):
        assert client.get(path).headers["content-type"] == "text/html; charset=utf-8"
    assert client.get("/static/page.js").headers["content-type"].startswith("text/javascript")


def test_a_file_that_did_not_change_is_not_sent_again(client: TestClient) -> None:
    tag = client.get("/static/page.js").headers["etag"]
    again = client.get("/static/page.js", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", {"static/page.js", "static/page.css", "static/favicon.svg", "docs"}),
        ("/docs", {"static/docs.js", "static/swagger/swagger-ui.css", "static/swagger/swagger-ui-bundle.js"}),
    ],
)
def test_html_has_nothing_inline_and_links_to_files_that_exist(
    path: str, expected: set[str], client: TestClient
) -> None:
    html = client.get(path).text
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|://", html)
    assert set(re.findall(r"<script[^>]*>(.*?)</script>", html)) == {""}
    links = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert expected <= set(links)
    for link in links:
        assert client.get(f"/{link}").status_code == 200, link


def test_modules_import_only_modules_that_are_there() -> None:
    found = {path.name: re.findall(r'from "\./([\w.]+)";', path.read_text()) for path in WEB.glob("*.js")}
    assert len(found["page.js"]) >= 3
    assert max(path.read_text().count("\n") for path in WEB.glob("*.js")) <= 200
    assert {name for names in found.values() for name in names} <= set(found)


def test_no_script_can_turn_text_into_html() -> None:
    """The policy would stop it; this says so before a person meets it."""
    for path in WEB.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", path.read_text()), path


def test_the_page_is_small() -> None:
    assert sum(path.stat().st_size for path in WEB.iterdir() if path.is_file()) < 300_000


@pytest.mark.parametrize("key", [None, "wrong"])
def test_the_page_opens_without_a_key(key: str | None, serving: Callable[..., TestClient]) -> None:
    client = serving(api_keys="right")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    assert client.get("/", headers=headers).status_code == 200
    assert client.get("/static/page.js", headers=headers).status_code == 200
