"""How busy the server is, live in the page: what its /metrics say, and nothing while nobody looks."""

import json
import re

import httpx
from playwright.sync_api import Route, expect
from visit import Visit


def test_numbers_come_while_the_panel_is_open(visit: Visit, photo: bytes) -> None:
    page = visit.open()
    asked = lambda: sum(url.endswith("/metrics") for url in visit.requests)  # noqa: E731
    assert asked() == 0
    page.get_by_text("How busy the server is").click()
    page.wait_for_timeout(500)
    for i in range(4):
        httpx.post(f"{visit.url}/embed", content=photo + b" " * i).raise_for_status()
    expect(page.locator("#pulse-facts")).to_contain_text("images a second")
    row = page.get_by_role("row", name="the encoder")
    expect(row).to_have_text(re.compile(r"the encoder[\d.]+ ms[\d.]+ ms"))
    expect(page.locator("#pulse-facts div", has_text="images in a batch").locator("dd")).not_to_have_text("–")
    expect(page.locator("#pulse-line")).to_have_attribute("points", re.compile(r"59,[\d.]+$"))
    visit.screenshot("pulse")
    page.get_by_text("How busy the server is").click()
    page.wait_for_timeout(2500)
    before = asked()
    assert before >= 2
    page.wait_for_timeout(2500)
    assert asked() == before
    visit.end()


def test_closed_metrics_are_told(visit: Visit) -> None:
    page = visit.open()
    error = {"code": "forbidden", "message": "not for you", "param": None}

    def refuse(route: Route) -> None:
        route.fulfill(status=403, json={"error": error})

    page.route("**/metrics", refuse)
    page.get_by_text("How busy the server is").click()
    expect(page.locator("#pulse-note")).to_contain_text("Its metrics are closed to this page.")
    expect(page.locator("#pulse-note")).to_contain_text("not for you")
    visit.end(allowed="status of 403")


def test_times_are_those_that_prometheus_would_tell(visit: Visit) -> None:
    """Against histogram_quantile's definition, on counts that fall on the edges and between them."""
    page = visit.open()

    def text(counts: list[int]) -> str:
        lines = ["# TYPE t histogram", 'other_bucket{le="0.1"} 99']
        edges = ["0.1", "0.2", "0.4", "+Inf"]
        lines += [f't_bucket{{le="{e}",route="/a"}} {sum(counts[: i + 1])}.0' for i, e in enumerate(edges)]
        return "\n".join(lines)

    script = """async ([before, after, q]) => {
        const { parse, quantile } = await import("/static/prometheus.js");
        return quantile(parse(before), parse(after), "t", q);
    }"""
    old = [5, 0, 1, 2]
    for counts, q, expected in (
        ([0, 10, 0, 0], 0.5, 0.15),
        ([4, 4, 2, 0], 0.5, 0.125),
        ([4, 4, 2, 0], 0.95, 0.35),
        ([0, 0, 0, 3], 0.5, 0.4),
        ([8, 0, 0, 0], 0.25, 0.025),
        ([0, 0, 0, 0], 0.5, None),
    ):
        new = [a + b for a, b in zip(old, counts, strict=True)]
        told = page.evaluate(script, [text(old), text(new), q])
        assert json.dumps(told and round(told, 9)) == json.dumps(expected), (counts, q)
    visit.end()
