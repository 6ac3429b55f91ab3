"""Two encoders side by side, and what the page says of an encoder, in a real Chromium."""

from collections.abc import Callable

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, expect
from visit import PHONE, Visit, encoders_of, ranks, start, unpacked, wait_for_samples

FIRST, SECOND = "simclr-vit-cifar10", "dino-vit-cifar10"  # the gallery is the first one's


@pytest.fixture(scope="module")
def url(shared_serve: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A server with these two encoders, and its samples."""
    url = start(shared_serve, *encoders_of(tmp_path_factory.mktemp("models"), FIRST, SECOND))
    wait_for_samples(url)
    return url


def embedding(url: str, image: bytes, encoder: str) -> np.ndarray:
    reply = httpx.post(f"{url}/embed", params={"encoder": encoder}, content=image)
    return np.array(reply.json()["results"][0]["embedding"])


def orders(url: str, id: str, encoder: str) -> tuple[list[str], list[str], list[float]]:
    """The ids of the 12 nearest of an image, the same in an encoder's order, and its scores in that order."""
    nearest = [n["id"] for n in httpx.get(f"{url}/neighbors", params={"id": id, "k": 12}).json()["neighbors"]]
    mine, *others = (
        embedding(url, httpx.get(f"{url}/gallery/images/{i}/image").content, encoder) for i in (id, *nearest)
    )
    scores = [float(mine @ other) for other in others]
    order = sorted(range(12), key=lambda i: -scores[i])
    return nearest, [nearest[i] for i in order], [scores[i] for i in order]


def on_view(visit: Visit, side: int) -> list[str]:
    """The ids of one side's order, once it is there."""
    links = visit.page.locator(f"#compare-orders article:nth-child({side + 1}) a")
    expect(links).to_have_count(12)
    return [href.removeprefix("#/image/") for href in links.evaluate_all("links => links.map(link => link.hash)")]


def test_a_link_shows_both_encoders(visit: Visit) -> None:
    url, page = visit.url, visit.page
    id = httpx.get(f"{url}/gallery/images", params={"limit": 30}).json()["images"][21]["id"]
    page.goto(f"{url}/?beside={SECOND}#/image/{id}")
    nearest, expected, scores = orders(url, id, SECOND)
    assert nearest != expected  # or nothing would be shown
    assert on_view(visit, 0) == nearest
    assert on_view(visit, 1) == expected
    tiles = page.locator("#compare-orders article:nth-child(2) li")
    for place, (tile, name, score) in enumerate(zip(tiles.all(), expected, scores, strict=True)):
        move = nearest.index(name) - place
        text = tile.inner_text()
        assert f"{score:.3f}" in text
        assert ("stays" if move == 0 else f"{'↑' if move > 0 else '↓'} {abs(move)}") in text
    expect(page.locator("#looks-title")).to_be_hidden()
    visit.screenshot("compare")

    image = httpx.get(f"{url}/gallery/images/{id}/image").content
    for side, encoder in enumerate((FIRST, SECOND)):
        reply = httpx.post(f"{url}/embed", params={"encoder": encoder, "outputs": "attention"}, content=image)
        maps = unpacked(reply.json()["results"][0]["attention"])
        look = f"#compare-looks article:nth-child({side + 1})"
        expect(page.locator(f"{look} h3")).to_have_text(encoder)
        for i, map in enumerate([maps.mean(axis=0), *maps]):
            light = visit.pixels(f"{look} label:nth-child({i + 1}) canvas")[..., :3] @ [0.2, 0.7, 0.1]
            assert np.corrcoef(ranks(light), ranks(np.rint(255 * (map - map.min()) / np.ptp(map))))[0, 1] > 0.95

    pictures = [f"#compare-looks article:nth-child({n}) .frame canvas" for n in (1, 2)]
    before = [visit.pixels(picture) for picture in pictures]
    page.locator("#compare-looks article:nth-child(2)").get_by_role("radio", name="Head 1").check()
    after = [visit.pixels(picture) for picture in pictures]
    assert (before[0] == after[0]).all()  # each has its own heads
    assert (before[1] != after[1]).any()
    visit.end()


def test_a_comparison_is_begun_walked_and_left(browser: Browser, url: str) -> None:
    visit = Visit(browser, url, PHONE)
    page = visit.open()
    page.get_by_label("Compare with").select_option(SECOND)
    assert f"beside={SECOND}" in page.url
    on_view(visit, 1)
    articles = page.locator("#compare-looks article, #compare-orders article").all()
    edges = [(box["x"], box["y"]) for article in articles if (box := article.bounding_box())]
    assert len(edges) == 4
    assert len({x for x, _ in edges}) == 1  # one below the other
    assert [y for _, y in edges] == sorted(y for _, y in edges)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    visit.screenshot("compare-phone")

    walked = on_view(visit, 1)[3]
    page.locator("#compare-orders article:nth-child(2) a").nth(3).click()
    visit.shown(walked)
    nearest, expected, _ = orders(url, walked, SECOND)
    foremost = page.locator("#compare-orders article:nth-child(2) a").first
    expect(foremost).to_have_attribute("href", f"#/image/{expected[0]}")
    assert on_view(visit, 0) == nearest

    page.get_by_label("Encoder", exact=True).select_option(SECOND)  # with itself there is nothing to compare
    expect(page.locator("#compare")).to_be_hidden()
    page.get_by_label("Compare with").select_option(FIRST)
    assert on_view(visit, 0) == expected  # though the gallery is of the other one
    assert on_view(visit, 1) == nearest
    page.reload()
    assert on_view(visit, 0) == expected
    page.get_by_role("button", name="Back to one encoder").click()
    expect(page.locator("#looks-title")).to_be_visible()
    assert "beside" not in page.url
    visit.end()


def test_the_card_tells_all_of_an_encoder(visit: Visit) -> None:
    page = visit.open()
    manifest = httpx.get(f"{visit.url}/encoders/{FIRST}").json()["manifest"]
    measured = manifest["measured"]["cifar10-knn"]
    card, rest = page.locator("#card"), page.locator("#card-rest")
    for text in ("SimCLR", "128 numbers", f"{100 * measured['headline']['accuracy']:.1f} % on cifar10"):
        expect(card).to_contain_text(text)
    expect(rest).to_be_hidden()
    page.get_by_text("More about this encoder").click()
    five = measured["accuracy"]["5"]
    for text in (
        manifest["data"], "32 × 32 pixels, in 8 × 8 patches of 4", "of the last block, in 4 heads",
        f"5-NN {100 * five:.1f} %", "10,000 images, by the labels of 50,000 others, 10 classes",
        "ONNX Runtime, in fp32", f"sha256 {manifest['sha256'][:12]}…", manifest["commit"],
    ):  # fmt: skip
        expect(rest).to_contain_text(text)
    assert rest.locator("pre").inner_text() == manifest["recipe"].strip()
    page.get_by_label("Encoder", exact=True).select_option(SECOND)
    expect(card).to_contain_text("DINO")
    expect(rest).not_to_contain_text("NN on")
    visit.end()
