"""Patches of the picture, chosen in a real Chromium: what is like them in it, and across the gallery."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, FloatRect, Locator, Page, Position, Response, Route, expect
from visit import PHONE, Visit, encoders_of, start, wait_for_samples

from patchsight_serve.heatmap import COLORS
from patchsight_serve.manifest import Transform
from patchsight_serve.region import Box, seen

ENCODER = "simclr-vit-cifar10"  # the quickest one: 8 × 8 patches
PATCHES = 8


@pytest.fixture(scope="module")
def url(shared_serve: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A server with that encoder alone, and its samples."""
    url = start(shared_serve, *encoders_of(tmp_path_factory.mktemp("models"), ENCODER))
    wait_for_samples(url)
    return url


def cosines(url: str, photo: bytes) -> np.ndarray:
    """`(P * P, P * P)` of all patches to each other, from the server's own tokens."""
    reply = httpx.post(
        f"{url}/embed", params={"outputs": "patch_tokens"}, content=photo, headers={"Accept": "application/x-npy"}
    )
    tokens = np.load(io.BytesIO(reply.content))[0].astype(np.float64)
    tokens = tokens.reshape(PATCHES * PATCHES, -1)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    return tokens @ tokens.T


def rectangle(locator: Locator) -> FloatRect:
    """Where it is on the page."""
    box = locator.bounding_box()
    assert box is not None
    return box


def middle(locator: Locator, column: int, row: int) -> Position:
    """Of a patch, in the grid's own pixels."""
    box = rectangle(locator)
    return {"x": (column + 0.5) / PATCHES * box["width"], "y": (row + 0.5) / PATCHES * box["height"]}


def colors(visit: Visit) -> np.ndarray:
    """`(P, P, 3)`: what is drawn in the middle of each patch, found by the encoder's square in the picture."""
    pixels = visit.pixels()[..., :3]
    height, width = pixels.shape[:2]
    side = min(height, width)
    at = ((np.arange(PATCHES) + 0.5) / PATCHES * side).astype(int)
    return pixels[np.ix_((height - side) // 2 + at, (width - side) // 2 + at)]


def painted(map: np.ndarray) -> np.ndarray:
    """The colors of a map `(P * P,)`, the least darkest and the greatest brightest."""
    steps = np.rint(255 * (map - map.min()) / np.ptp(map)).astype(int)
    return COLORS[steps].reshape(PATCHES, PATCHES, 3).astype(int)


def bare_overlay(page: Page) -> None:
    """The map alone, patch by patch."""
    page.get_by_label("Overlay").fill("100")
    page.get_by_role("radio", name="Patches").check()


def test_what_is_like_the_patch_that_is_clicked(visit: Visit, photo: bytes) -> None:
    page = visit.open()
    visit.upload("mine.jpg", photo)  # portrait: the encoder sees a square in its middle
    visit.shown("mine.jpg")
    bare_overlay(page)
    attention = visit.pixels()
    alike = cosines(visit.url, photo)
    asked = len(visit.requests)
    assert not [u for u in visit.requests if "patch_tokens" in u]

    patches = page.locator("#patches")
    for column, row in ((2, 6), (7, 0)):
        patches.click(position=middle(patches, column, row))
        expect(page.locator("#looks-title")).to_have_text("What is like this patch")
        chosen = row * PATCHES + column
        expect(page.locator("#attention-note")).to_contain_text(
            f"from {alike[chosen].min():.2f} to {np.delete(alike[chosen], chosen).max():.2f}"
        )
        drawn = colors(visit)
        assert np.abs(drawn - painted(alike[chosen])).max() <= 6  # of neighboring steps, by rounding
        assert (drawn[row, column] == COLORS[255]).all()
        assert (drawn.sum(axis=2) == drawn[row, column].sum()).sum() == 1  # nothing else is as bright
        frame, canvas = (rectangle(page.locator(s)) for s in ("#patch-chosen", "#picture"))
        patch = canvas["width"] / PATCHES
        top = canvas["y"] + (canvas["height"] - canvas["width"]) / 2
        assert abs(frame["x"] - canvas["x"] - column * patch) < 1.5
        assert abs(frame["y"] - top - row * patch) < 1.5
        assert abs(frame["width"] - patch) < 1.5
        if column == 2:
            visit.screenshot("patch")
    assert len([u for u in visit.requests[asked:] if "patch_tokens" in u]) == 1  # asked for once

    page.get_by_role("button", name="Back to the attention").click()
    expect(page.locator("#looks-title")).to_have_text("Where it looks")
    assert (visit.pixels() == attention).all()
    visit.end()


def test_patches_by_keyboard(visit: Visit, photo: bytes) -> None:
    page = visit.open()
    visit.upload("mine.jpg", photo)
    visit.shown("mine.jpg")
    bare_overlay(page)
    attention = visit.pixels()
    alike = cosines(visit.url, photo)
    patches = page.get_by_role("application")
    patches.focus()
    patches.press("ArrowLeft")  # from the middle, (4, 4)
    patches.press("ArrowUp")
    expect(page.locator("#status")).to_have_text("Row 4, column 4")
    patches.press("Enter")
    expect(page.locator("#looks-title")).to_have_text("What is like this patch")
    assert np.abs(colors(visit) - painted(alike[3 * PATCHES + 3])).max() <= 6
    patches.press("ArrowDown")
    expect(page.locator("#status")).to_have_text(f"Row 5, column 4: {alike[3 * PATCHES + 3, 4 * PATCHES + 3]:.2f}")
    for key in ("Shift+ArrowRight", "Shift+ArrowRight", "Shift+ArrowDown", "Enter"):
        patches.press(key)
    expect(page.locator("#looks-title")).to_have_text("What is like these patches")
    block = [row * PATCHES + column for row in (4, 5) for column in (3, 4, 5)]
    assert np.abs(colors(visit) - painted(alike[block].max(axis=0))).max() <= 6
    for _ in range(20):
        patches.press("ArrowRight")  # the edge holds
    expect(page.locator("#status")).to_contain_text("Row 6, column 8")
    patches.press("Escape")
    expect(page.locator("#looks-title")).to_have_text("Where it looks")
    assert (visit.pixels() == attention).all()
    visit.end()


def test_chosen_patches_stand_in_the_address(browser: Browser, visit: Visit) -> None:
    id = httpx.get(f"{visit.url}/gallery/images", params={"limit": 1}).json()["images"][0]["id"]
    page = visit.open(f"/#/image/{id}")
    bare_overlay(page)
    page.locator("#patches").click(position=middle(page.locator("#patches"), 5, 2))
    expect(page.locator("#looks-title")).to_have_text("What is like this patch")
    address, chosen = page.url.removeprefix(visit.url), visit.pixels()
    assert re.fullmatch(rf"/#/image/{id}\?box=(0\.\d+,){{3}}0\.\d+", address)
    page.get_by_role("link", name="Groups").click()
    page.get_by_role("link", name="Picture", exact=True).click()
    expect(page).to_have_url(visit.url + address)

    other = Visit(browser, visit.url)
    other.open(address)
    expect(other.page.locator("#looks-title")).to_have_text("What is like this patch")
    bare_overlay(other.page)
    assert (other.pixels() == chosen).all()
    other.page.goto(f"{visit.url}/#/image/{id}?box=0,0,1,1")  # all that the encoder sees, and more
    expect(other.page.locator("#attention-note")).to_have_text(re.compile("All patches are chosen"))
    other.page.get_by_role("button", name="Back to the attention").click()
    expect(other.page).to_have_url(f"{visit.url}/#/image/{id}")
    for nonsense in ("1,2", "a,b,c,d", "1.2.3,0,0,1"):
        other.page.goto(f"{visit.url}/?{nonsense[0]}#/image/{id}?box={nonsense}")
        expect(other.page.locator("#neighbors img[src]").first).to_be_visible()
    for one in (visit, other):
        one.end()


def test_a_block_of_patches_is_found_across_the_gallery(visit: Visit, photo: bytes) -> None:
    page = visit.open()
    visit.upload("mine.jpg", photo)
    visit.shown("mine.jpg")
    patches = page.locator("#patches")
    patches.scroll_into_view_if_needed()
    box = rectangle(patches)
    start, end = middle(patches, 4, 3), middle(patches, 2, 5)
    page.mouse.move(box["x"] + start["x"], box["y"] + start["y"])
    page.mouse.down()
    page.mouse.move(box["x"] + end["x"], box["y"] + end["y"], steps=4)
    page.mouse.up()
    expect(page.locator("#looks-title")).to_have_text("What is like these patches")
    with page.expect_response(lambda reply: "neighbors/region" in reply.url) as answered:
        page.get_by_role("button", name="Find it across the gallery").click()
        expect(page.locator("#across-note")).to_contain_text("Looking into 40 pictures")
        expect(page.get_by_role("progressbar")).to_be_visible()
    query = asked(answered.value)
    square = seen(Image.open(io.BytesIO(photo)).size, Transform(resize=32, crop=32))
    expected = Box(2 / PATCHES, 3 / PATCHES, 5 / PATCHES, 6 / PATCHES).within(square)
    found = [float(edge) for edge in query["box"].split(",")]
    assert np.allclose(found, [expected.x0, expected.y0, expected.x1, expected.y1], atol=1e-5)
    assert query["candidates"] == "40"

    neighbors = answered.value.json()["neighbors"]
    tiles = page.locator("#across-found li")
    expect(tiles).to_have_count(12)
    expect(page.locator("#across-note")).to_contain_text("Looked into: the 40 pictures")
    hrefs = page.locator("#across-found a").evaluate_all("links => links.map(link => link.hash)")
    assert hrefs == [f"#/image/{n['id']}" for n in neighbors]
    for tile, neighbor in list(zip(tiles.all(), neighbors, strict=True))[:4]:
        expect(tile).to_contain_text(f"{neighbor['score']:.3f}")
        frame = tile.locator(".found-frame")
        expect(frame).to_be_visible()
        size = tile.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]")
        outer, inner = rectangle(tile.locator(".found")), rectangle(frame)
        longer, side = max(size), outer["width"]
        for axis, (width, low, high) in enumerate(zip(size, neighbor["box"][:2], neighbor["box"][2:], strict=True)):
            shown, key = width / longer, "xy"[axis]
            assert abs(inner[key] - outer[key] - side * ((1 - shown) / 2 + low * shown)) < 1.5  # type: ignore[literal-required]
            assert abs(inner["width" if axis == 0 else "height"] - side * (high - low) * shown) < 1.5
    visit.screenshot("across")

    with page.expect_event("requestfailed", lambda request: "candidates=200" in request.url):
        page.get_by_role("button", name="Look into more pictures").click()
        page.get_by_role("button", name="Back to what is like the whole picture").click()  # the search ends
    expect(page.locator("#alike")).to_be_visible()
    expect(page.locator("#across")).to_be_hidden()

    page.get_by_role("button", name="Find it across the gallery").click()
    expect(tiles).to_have_count(12)
    tiles.nth(1).get_by_role("link").click()
    visit.shown(neighbors[1]["id"])
    expect(page.locator("#trail a")).to_have_count(2)  # the way leads on
    expect(page.locator("#across")).to_be_hidden()
    expect(page.locator("#looks-title")).to_have_text("Where it looks")
    visit.end()


def asked(reply: Response) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(reply.url).query).items()}


def test_the_square_is_where_the_server_cuts_it(visit: Visit) -> None:
    """For encoders that cut a margin away as well, of which none is shipped."""
    page = visit.open()
    for width, height, resize, crop in ((160, 213, 32, 32), (500, 300, 256, 224), (224, 224, 256, 224), (1, 900, 8, 4)):
        place = page.evaluate(
            """async ([width, height, transform]) => {
                const { boxOf, squareOf } = await import("/static/square.js");
                const block = { left: 1, top: 0, right: 3, bottom: 4 };
                return boxOf(block, { h: 4, w: 4 }, squareOf(width, height, transform));
            }""",
            [width, height, {"resize": resize, "crop": crop}],
        )
        expected = Box(0.25, 0, 0.75, 1).within(seen((width, height), Transform(resize=resize, crop=crop)))
        assert np.allclose(place, [expected.x0, expected.y0, expected.x1, expected.y1], atol=1e-12)
    visit.end()


def test_an_encoder_without_patches_says_so(visit: Visit) -> None:
    """As a ResNet's entry is: this one's without its tokens."""

    def without_patches(route: Route) -> None:
        listed = httpx.get(route.request.url).json()
        for encoder in listed["encoders"]:
            encoder["outputs"] = {"embedding": encoder["outputs"]["embedding"]}
        route.fulfill(json=listed)

    visit.page.route(re.compile("/encoders$"), without_patches)
    page = visit.open()
    expect(page.locator("#attention-note")).to_contain_text("no patches to choose: it sees the picture as a whole")
    expect(page.locator("#patches")).to_be_hidden()
    expect(page.locator("#looks-title")).to_have_text("What it sees")
    visit.end()


@pytest.fixture
def forgetful(serve: Callable[..., str], tmp_path: Path) -> str:
    """A server that keeps no originals."""
    url = start(serve, *encoders_of(tmp_path / "models", ENCODER), "--no-keep-originals")
    wait_for_samples(url)
    return url


def test_without_originals_nothing_is_found_and_a_phone_shows_why(browser: Browser, forgetful: str) -> None:
    visit = Visit(browser, forgetful, PHONE)
    page = visit.open()
    page.locator("#patches").click()
    page.get_by_role("button", name="Find it across the gallery").click()
    expect(page.locator("#across-note")).to_contain_text("where the originals of pictures were kept")
    expect(page.get_by_role("progressbar")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    visit.screenshot("patch-phone")
    visit.end(allowed="status of 40[49]")
