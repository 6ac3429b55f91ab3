"""The gallery as a map, in a real Chromium: points where the server says, thumbnails, legend, UMAP; by hand, by key."""

from collections import Counter
from collections.abc import Callable

import httpx
import numpy as np
import pytest
from map_view import ask, painted, places, view
from playwright.sync_api import Browser, Page, expect
from visit import DESKTOP, PHONE, Visit, start

UMAP_MS = 280_000  # numba compiles, beside other work
HTML = "<img src=x onerror=\"document.title='owned'\">"


def open_map(visit: Visit) -> Page:
    visit.page.goto(f"{visit.url}/#/map")
    expect(visit.page.locator("#plane[data-scale]")).to_be_visible()
    return visit.page


def test_the_map_by_hand_and_by_key(visit: Visit) -> None:
    page = open_map(visit)
    reply = ask(visit.url, method="pca")
    page.get_by_role("radio", name="Components").check()
    expect(page.locator("#map-how")).to_contain_text("200 pictures. By principal components")
    page.wait_for_timeout(1200)  # points move, where UMAP was first
    at = places(page, reply)
    assert (painted(visit, at) > 200).all()
    empty = np.stack(np.meshgrid(np.arange(40, 1180, 20), np.arange(40, 500, 20)), -1).reshape(-1, 2).astype(float)
    empty = empty[np.linalg.norm(empty[:, None] - at, axis=2).min(axis=1) > 40]
    assert (painted(visit, empty) == 0).mean() > 0.95

    counts = Counter(reply["labels"]).most_common()
    expect(page.locator("#map-legend button")).to_have_count(len(counts))
    label, count = counts[0]
    button = page.locator("#map-legend").get_by_role("button", name=f"{label} {count}")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    own = np.array([other == label for other in reply["labels"]])
    assert (painted(visit, at[own]) > 200).all()
    assert (painted(visit, at[~own]) > 200).mean() < 0.3
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")

    # The lone picture farthest from all others can be pointed at without doubt.
    apart = np.linalg.norm(at[:, None] - at, axis=2) + 1e9 * np.eye(len(at))
    lone = int(apart.min(axis=1).argmax())
    canvas = page.locator("#plane")
    box = canvas.bounding_box()
    assert box
    page.mouse.move(box["x"] + at[lone, 0], box["y"] + at[lone, 1])
    expect(page.locator("#map-tip")).to_contain_text(reply["ids"][lone])
    expect(page.locator("#map-tip")).to_contain_text(reply["labels"][lone])
    before = view(page)
    asked = len([url for url in visit.requests if url.endswith("/thumbnail")])
    page.mouse.wheel(0, -300)
    closer = view(page)
    assert closer["scale"] > 1.5 * before["scale"]
    assert places(page, reply)[lone] == pytest.approx(at[lone], abs=1)  # what is under the pointer stays there
    for _ in range(4):
        page.mouse.wheel(0, -300)
    view(page)
    page.wait_for_timeout(1500)
    thumbnails = len([url for url in visit.requests if url.endswith("/thumbnail")]) - asked
    assert 1 <= thumbnails <= 5 * 60
    near = places(page, reply)[lone]
    assert painted(visit, near[None] + [18, -18])[0] == 255  # beyond any mark, within a thumbnail
    # Outwards, so that what is in the middle is the map still: it cannot be dragged out of sight.
    way = np.sign(at[lone] - [box["width"] / 2, box["height"] / 2]) * [60, 40]
    page.mouse.down()
    page.mouse.move(box["x"] + at[lone, 0] + way[0], box["y"] + at[lone, 1] + way[1], steps=4)
    page.mouse.up()
    assert places(page, reply)[lone] == pytest.approx(near + way, abs=2)
    assert page.url.endswith("#/map")  # a drag is no click
    visit.screenshot("map-near", full_page=False)

    canvas.focus()
    page.keyboard.press("0")
    assert view(page)["scale"] == pytest.approx(before["scale"])
    page.keyboard.press("+")
    assert view(page)["scale"] == pytest.approx(1.5 * before["scale"])
    page.keyboard.press("ArrowRight")
    assert view(page)["x"] > before["x"]
    distances = np.linalg.norm(places(page, reply) - [box["width"] / 2, box["height"] / 2], axis=1)
    in_the_middle = {reply["ids"][i] for i in np.argsort(distances)[:12]}
    spoken = page.locator("#status").inner_text()
    assert spoken.split(", ")[-1] in in_the_middle
    page.keyboard.press("Enter")
    visit.shown(spoken.split(", ")[-1])
    page.go_back()
    expect(canvas).to_be_visible()
    page.wait_for_timeout(2000)  # the map is asked for anew
    page.get_by_role("button", name="The whole map").click()
    at = places(page, reply)
    assert (painted(visit, at) > 200).all()
    canvas.click(position={"x": float(at[lone, 0]), "y": float(at[lone, 1])})
    expect(page).to_have_url(f"{visit.url}/#/image/{reply['ids'][lone]}")
    visit.shown(reply["ids"][lone])
    visit.end()


def test_two_fingers(browser: Browser, url: str) -> None:
    """They spread to three times their distance: what lies between them stays there, three times as large."""
    visit = Visit(browser, url, PHONE)
    page = open_map(visit)
    page.get_by_role("radio", name="Components").check()
    page.wait_for_timeout(1200)
    reply, before = ask(visit.url, method="pca"), view(page)
    canvas = page.locator("#plane")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box
    at = places(page, reply)
    middle = np.array([0.4 * box["width"], 0.5 * box["height"]])
    devtools = visit.context.new_cdp_session(page)

    def touch(kind: str, apart: float | None = None) -> None:
        x, y = box["x"] + middle[0], box["y"] + middle[1]
        fingers = [] if apart is None else [{"x": x + side * apart, "y": y, "id": i} for i, side in enumerate((-1, 1))]
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    touch("touchStart", 20)
    for apart in np.linspace(20, 60, 21)[1:]:
        touch("touchMove", float(apart))
    touch("touchEnd")
    assert view(page)["scale"] == pytest.approx(3 * before["scale"], rel=0.02)
    np.testing.assert_allclose(places(page, reply), middle + 3 * (at - middle), atol=4)
    expect(page).to_have_url(f"{visit.url}/#/map")  # a pinch is no click
    visit.end()


def test_umap_arrives_and_the_points_move(browser: Browser, url: str) -> None:
    for name, viewport, scheme in (
        ("map", DESKTOP, "light"),
        ("map-dark", DESKTOP, "dark"),
        ("map-phone", PHONE, "light"),
    ):
        visit = Visit(browser, url, viewport, scheme)
        page = open_map(visit)
        expect(page.locator("#map-how")).to_contain_text("By UMAP", timeout=UMAP_MS)
        expect(page.get_by_role("radio", name="UMAP")).to_be_checked()
        page.wait_for_timeout(1200)
        reply = ask(url)
        assert reply["method"] == "umap"
        assert (painted(visit, places(page, reply)) > 200).all()
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        canvas = page.locator("#plane").bounding_box()
        assert canvas
        page.mouse.move(canvas["x"] + canvas["width"] * 0.45, canvas["y"] + canvas["height"] * 0.6)
        page.mouse.wheel(0, -300)
        page.wait_for_timeout(2000)  # thumbnails come
        visit.screenshot(name, full_page=name != "map")
        visit.end()


def test_an_empty_gallery_and_labels_that_are_html(browser: Browser, serve: Callable[..., str], photo: bytes) -> None:
    visit = Visit(browser, start(serve, "--no-sample-gallery"))
    page = visit.page
    page.goto(f"{visit.url}/#/map")
    expect(page.locator("#map")).to_contain_text("The gallery is empty.")
    for i, label in enumerate([HTML, HTML, "shoes", None]):
        query = {"id": f"i{i}", **({"label": label} if label else {})}
        # Bytes that differ behind the picture's end make other pictures of it.
        httpx.post(f"{visit.url}/gallery/images", params=query, content=photo + bytes([i])).raise_for_status()
    page.goto(f"{visit.url}/")
    page.locator("nav").get_by_role("link", name="Map").click()
    expect(page.locator("#map-how")).to_contain_text("4 pictures.")
    expect(page.locator("#map-how")).to_contain_text("too few pictures")
    expect(page.locator("#map-legend li")).to_have_text([f"{HTML}2", "shoes1", "without a label1"])
    assert "owned" not in page.title()
    assert page.locator("#map img[src=x]").count() == 0
    visit.end()
