"""The gallery in groups: clusters and near-duplicates as the API tells them, and copies that are removed."""

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect
from visit import DESKTOP, PHONE, Visit, start


@pytest.fixture(scope="module")
def url(shared_serve: Callable[..., str], samples: Callable[[], tuple[str, Path]], photo: bytes) -> str:
    """A server with the sample gallery, and in it one photo three times, byte for byte."""
    url = start(shared_serve, *samples())
    for id in ("x1", "x2", "x3"):
        httpx.post(f"{url}/gallery/images", params={"id": id, "label": "mine"}, content=photo).raise_for_status()
    return url


def test_groups_are_those_of_the_api(browser: Browser, url: str) -> None:
    visit = Visit(browser, url)
    page = visit.page
    page.goto(f"{url}/#/groups")
    clusters, duplicates = page.locator("#groups section").nth(0), page.locator("#groups section").nth(1)
    expect(clusters.locator(".group-list > li")).to_have_count(10)  # √(203 / 2)
    slider = clusters.get_by_role("slider")
    slider.fill("4")
    expect(clusters.get_by_role("status")).to_have_text("203 pictures in 4 groups.")
    found = httpx.get(f"{url}/gallery/clusters", params={"k": 4, "typical": 8}).json()["clusters"]
    for item, cluster in zip(clusters.locator(".group-list > li").all(), found, strict=True):
        hrefs = item.locator("a").evaluate_all("links => links.map(link => link.hash)")
        assert hrefs == [f"#/image/{image['id']}" for image in cluster["typical"]]
        assert item.locator("h3").inner_text() == cluster["labels"][0]["label"]
        first = cluster["labels"][0]
        assert f"{first['label']} {100 * first['count'] / cluster['size']:.0f} %" in item.locator(".note").inner_text()

    expect(duplicates.locator(".copy")).to_have_text(["copy of x1", "copy of x1"])
    assert duplicates.get_by_role("slider").input_value() == "0.95"
    duplicates.get_by_role("slider").fill("0.8")
    total = httpx.get(f"{url}/gallery/duplicates", params={"min_score": 0.8}).json()["total"]
    expect(duplicates.get_by_role("status")).to_contain_text(re.compile(rf"^{total} groups? among 203 pictures"))
    expect(page.locator("#groups img[src]").first).to_be_visible()
    visit.screenshot("groups")
    page.emulate_media(color_scheme="dark")
    visit.screenshot("groups-dark")
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    visit.screenshot("groups-phone")
    page.set_viewport_size(DESKTOP)
    clusters.locator("a").first.click()
    visit.shown(found[0]["typical"][0]["id"])
    visit.end()


def test_copies_are_removed_once_confirmed(browser: Browser, url: str) -> None:
    visit = Visit(browser, url)
    page = visit.page
    page.goto(f"{url}/#/groups")
    button = page.get_by_role("button", name="Remove the copies")
    button.click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Remove 2 copies?")
    dialog.get_by_role("button", name="Cancel").click()
    button.click()
    dialog.get_by_role("button", name="Remove 2").click()
    expect(page.locator("#gallery-note")).to_contain_text("201 pictures")
    expect(button).to_have_count(0)
    expect(page.locator("#groups .copy")).to_have_count(0)
    statuses = [httpx.get(f"{url}/gallery/images/{id}").status_code for id in ("x1", "x2", "x3")]
    assert statuses == [200, 404, 404]
    page.goto(f"{url}/?gallery=none#/groups")
    expect(page.locator("#groups")).to_contain_text("The gallery is empty")
    visit.end()
