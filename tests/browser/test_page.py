"""The page in a real Chromium, against a real server with the shipped encoder and its sample gallery."""

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Route, expect
from visit import DESKTOP, PHONE, Visit, jpeg, ranks, start, unpacked


def names(visit: Visit) -> list[str]:
    """The ids of the neighbors on view."""
    hrefs = visit.page.locator("#neighbors a").evaluate_all("links => links.map(link => link.hash)")
    return [href.removeprefix("#/image/") for href in hrefs]


def test_first_visit_in_both_themes_and_on_a_phone(browser: Browser, url: str) -> None:
    """Who comes empty-handed sees a sample: attention, neighbors with labels, a vote, and what the encoder is."""
    manifest = next(e for e in httpx.get(f"{url}/encoders").json()["encoders"] if e["default"])["manifest"]
    for name, viewport, scheme in (
        ("page", DESKTOP, "light"), ("page-dark", DESKTOP, "dark"), ("page-phone", PHONE, "light"),
    ):  # fmt: skip
        visit = Visit(browser, url, viewport, scheme)
        page = visit.open()
        expect(page.locator("#neighbors li")).to_have_count(12)
        for text in page.locator("#neighbors li").all_inner_texts():
            assert re.fullmatch(r"[a-z-]+\s+[01]\.\d{3}", text)
        expect(page.locator("#vote")).to_contain_text(re.compile(r"The 12 nearest say [a-z-]+, with \d+ % of the vote"))
        expect(page.locator("#card")).to_contain_text(manifest["architecture"])
        expect(page.locator("#card")).to_contain_text("384 numbers")  # CLS and mean side by side
        expect(page.locator("#card")).to_contain_text(manifest["license"])
        expect(page.locator("#embed-time")).to_have_text(re.compile(r"decode [\d.]+ ms · queue .* · infer .*"))
        assert visit.pixels()[..., :3].std() > 10
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (sum(paper) < 200) == (scheme == "dark")
        visit.screenshot(name)
        visit.end()


def test_attention_of_each_head(visit: Visit, photo: bytes) -> None:
    page = visit.open()
    visit.upload("mine.jpg", photo)
    visit.shown("mine.jpg")
    reply = httpx.post(f"{visit.url}/embed", params={"outputs": "attention"}, files={"images": photo})
    maps = unpacked(reply.json()["results"][0]["attention"])
    for i, map in enumerate([maps.mean(axis=0), *maps]):
        small = visit.pixels(f"#heads label:nth-child({i + 1}) canvas")[..., :3].astype(float)
        assert small.shape[:2] == map.shape
        light = small @ [0.2, 0.7, 0.1]
        # One patch may outshine the others by far: those then share few of the 256 colors, and are equal in rank.
        steps = np.rint(255 * (map - map.min()) / np.ptp(map))
        assert np.corrcoef(ranks(light), ranks(steps))[0, 1] > 0.98

    mean = visit.pixels()
    shines_where_it_looks(visit, maps.mean(axis=0))
    page.get_by_role("radio", name="Head 1").check()
    one = visit.pixels()
    height, width = mean.shape[:2]
    top = (height - width) // 2
    assert (mean[top:-top] != one[top:-top]).any(axis=2).mean() > 0.5
    assert (mean[: top - 1] == one[: top - 1]).all()  # outside the square that the encoder sees
    page.get_by_role("radio", name="Head 1").press("ArrowRight")
    expect(page.get_by_role("radio", name="Head 2")).to_be_checked()
    assert (visit.pixels() != one).any()

    smooth = visit.pixels()
    page.get_by_role("radio", name="Patches").check()
    assert (visit.pixels() != smooth).any()
    page.get_by_label("Overlay").fill("0")
    bare = visit.pixels()[top:-top, :, :3].astype(float)
    picture = Image.open(io.BytesIO(photo)).resize((width, height), Image.Resampling.BICUBIC)
    assert np.abs(bare - np.asarray(picture)[top:-top]).mean() < 3
    visit.end()


def shines_where_it_looks(visit: Visit, map: np.ndarray) -> None:
    """The overlay is on the right patches of the picture, which it makes the lighter the more attention they have."""
    page, patches = visit.page, len(map)
    page.get_by_role("radio", name="Patches").check()
    over = visit.pixels()[..., :3].astype(float)
    page.get_by_label("Overlay").fill("0")
    bare = visit.pixels()[..., :3].astype(float)
    page.get_by_label("Overlay").fill("55")
    page.get_by_role("radio", name="Smooth").check()
    height, width = bare.shape[:2]
    at = ((np.arange(patches) + 0.5) / patches * min(height, width)).astype(int)
    places = np.ix_((height - min(height, width)) // 2 + at, (width - min(height, width)) // 2 + at)
    over, bare = over[places] @ [0.2, 0.7, 0.1], bare[places] @ [0.2, 0.7, 0.1]
    layer = (over - 0.45 * bare) / 0.55  # what was laid on, free of what is below it
    assert np.corrcoef(ranks(layer), ranks(map))[0, 1] > 0.95
    order = map.ravel().argsort()
    lighter = (over - bare).ravel()
    tenth = len(order) // 10
    assert lighter[order[-tenth:]].mean() > lighter[order[:tenth]].mean() + 20


def test_walk_from_neighbor_to_neighbor_and_back(visit: Visit, photo: bytes) -> None:
    page = visit.open()
    visit.upload("mine.jpg", photo)
    visit.shown("mine.jpg")
    found = httpx.post(f"{visit.url}/neighbors", params={"k": 12}, files={"images": photo}).json()["neighbors"]
    assert names(visit) == [n["id"] for n in found]

    first = names(visit)[0]
    page.locator("#neighbors a").first.click()
    visit.shown(first)
    expected = httpx.get(f"{visit.url}/neighbors", params={"k": 12, "id": first}).json()["neighbors"]
    assert names(visit) == [n["id"] for n in expected]
    assert f"{visit.url}/gallery/images/{first}/image" in visit.requests  # what is encoded is no thumbnail
    expect(page.locator("#neighbors li").first).to_contain_text(f"{expected[0]['score']:.3f}")
    second = names(visit)[1]
    page.locator("#neighbors a").nth(1).press("Enter")
    visit.shown(second)
    links = page.locator("#trail a")
    hrefs = [f"#/image/{i}" for i in (first, second)]
    assert links.evaluate_all("links => links.map(link => link.hash)") == ["#/upload/0", *hrefs]
    expect(links.last).to_have_attribute("aria-current", "true")

    page.go_back()
    visit.shown(first)
    expect(links).to_have_count(2)
    links.first.click()
    visit.shown("mine.jpg")
    expect(page.locator("#trail")).to_be_hidden()
    visit.end()


def test_a_picture_that_comes_late_does_not_lead_away_from_the_map(visit: Visit) -> None:
    page = visit.open()
    before = page.locator("#picture-name").inner_text()
    held: list[Route] = []
    page.route("**/embed?*", lambda route: held.append(route))
    page.locator("#neighbors a").first.click()
    expect(page.locator("body")).to_have_class("busy")
    page.locator("nav").get_by_role("link", name="Map").click()
    expect(page.locator("#plane[data-scale]")).to_be_visible()
    expect(page.locator("body")).not_to_have_class("busy")
    for route in held:
        route.continue_()
    page.wait_for_load_state("networkidle")
    expect(page).to_have_url(f"{visit.url}/#/map")
    expect(page.locator("#plane")).to_be_visible()
    page.unroute("**/embed?*")
    page.locator("nav").get_by_role("link", name="Picture").click()
    visit.shown(before)
    page.locator("#neighbors a").first.click()
    expect(page.locator("#picture-name")).not_to_have_text(before)
    visit.end()


def test_a_picture_that_comes_late_does_not_undo_the_way_back(visit: Visit) -> None:
    page = visit.open()
    before, address = page.locator("#picture-name").inner_text(), page.url
    held: list[Route] = []
    page.route("**/embed?*", lambda route: held.append(route))
    page.locator("#neighbors a").first.click()
    expect(page.locator("body")).to_have_class("busy")
    page.go_back()
    expect(page.locator("body")).not_to_have_class("busy")
    for route in held:
        route.continue_()
    page.wait_for_load_state("networkidle")
    expect(page).to_have_url(address)
    visit.shown(before)
    visit.end()


def test_several_at_once_dropped_and_pasted(visit: Visit, photo: bytes) -> None:
    page = visit.open()
    files = [{"name": name, "mimeType": "image/jpeg", "buffer": photo} for name in ("one.jpg", "two.jpg")]
    page.locator("#file").set_input_files(files)  # type: ignore[arg-type]
    visit.shown("one.jpg")
    page.locator("#strip").get_by_role("link", name="two.jpg").click()
    visit.shown("two.jpg")
    for event, name, key in (("drop", "dropped.jpg", "dataTransfer"), ("paste", "pasted.jpg", "clipboardData")):
        script = """([bytes, event, name, key]) => {
            const files = new DataTransfer();
            files.items.add(new File([Uint8Array.from(bytes)], name));
            const Kind = { drop: DragEvent, paste: ClipboardEvent }[event];
            document.body.dispatchEvent(new Kind(event, { [key]: files, bubbles: true, cancelable: true }));
        }"""
        page.evaluate(script, [list(photo), event, name, key])
        visit.shown(name)
    expect(page.locator("#strip a[href^='#/upload']")).to_have_count(4)
    visit.end()


def test_a_bad_file_is_told_and_harms_nothing(visit: Visit, photo: bytes) -> None:
    page = visit.open()
    before = page.locator("#picture-name").inner_text()
    notice = page.get_by_role("alert")
    for name, data, message in (
        ("notes.jpg", b"these are notes", "Not an image that this server reads. notes.jpg: "),
        ("half.jpg", photo[: len(photo) // 2], "This image is damaged. half.jpg: "),
        ("nothing.jpg", b"", "This cannot be read. nothing.jpg: the image is empty"),
    ):
        visit.upload(name, data)
        expect(notice).to_contain_text(message)
        visit.shown(before)
    page.get_by_role("button", name="Close the message").click()
    expect(notice).to_be_hidden()
    visit.upload("good.jpg", photo)
    visit.shown("good.jpg")
    tiff = io.BytesIO()
    Image.open(io.BytesIO(photo)).save(tiff, "TIFF")
    visit.upload("scan.tif", tiff.getvalue())  # read by the server, not by Chromium
    visit.shown("scan.tif")
    expect(page.locator("#attention-note")).to_contain_text("the map stands alone")
    visit.end(allowed=r"status of (400|415|422)|ERR_FILE_NOT_FOUND")


def test_what_is_added_is_found_and_its_label_is_only_text(
    browser: Browser, serve: Callable[..., str], samples: Callable[[], tuple[str, Path]], photo: bytes
) -> None:
    visit = Visit(browser, start(serve, *samples()))
    page = visit.open()
    visit.upload("mine.jpg", photo)
    visit.shown("mine.jpg")
    label = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    page.get_by_label("Keep this picture").fill(label)
    page.get_by_role("button", name="Add to the gallery").click()
    expect(page.locator("#picture-label")).to_have_text(f"labelled {label}")
    expect(page.locator("#gallery-note")).to_contain_text("201 pictures")

    nearly = jpeg(Image.open(io.BytesIO(photo)).crop((1, 1, 159, 212)))
    visit.upload("nearly.jpg", nearly)
    visit.shown("nearly.jpg")
    expect(page.locator("#neighbors .name", has_text=label)).to_have_text(label)
    assert page.title() == "nearly.jpg · patchsight"
    assert page.locator("img[src=x], main script").count() == 0

    visit.upload("again.jpg", photo)
    visit.shown("again.jpg")
    page.get_by_role("button", name="Add to the gallery").click()
    expect(page.get_by_role("alert")).to_contain_text("It is there already.")

    tiff = io.BytesIO()
    Image.open(io.BytesIO(photo)).save(tiff, "TIFF")
    httpx.post(f"{visit.url}/gallery/images", params={"id": "scan"}, content=tiff.getvalue())
    page.goto(f"{visit.url}/#/image/scan")
    visit.shown("scan")  # encoded as it is, and shown by its thumbnail, as Chromium reads no TIFF
    expect(page.locator("#attention-note")).not_to_contain_text("the map stands alone")
    visit.end()


def test_the_key_is_asked_for_once(
    browser: Browser, serve: Callable[..., str], samples: Callable[[], tuple[str, Path]]
) -> None:
    url = start(serve, "--api-keys", "open sesame,other", *samples())
    visit = Visit(browser, url)
    page = visit.page
    page.goto(url)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("alert")).to_contain_text("An API key is needed.")
    page.get_by_role("button", name="Try again").click()
    dialog.get_by_label("API key").fill("wrong")
    dialog.get_by_label("API key").press("Enter")
    expect(dialog).to_contain_text("The server refused that key.")
    dialog.get_by_label("API key").fill("open sesame")
    dialog.get_by_role("button", name="Continue").click()
    expect(page.locator("#neighbors img[src]")).to_have_count(12)
    loaded = "images => images.every(image => image.complete && image.naturalWidth > 0)"
    assert page.locator("#neighbors img, #strip img").evaluate_all(loaded)
    page.reload()
    expect(page.locator("#neighbors img[src]")).to_have_count(12)
    expect(dialog).to_be_hidden()
    visit.end(allowed="status of 401")


def test_a_lost_server_is_waited_for(visit: Visit, photo: bytes) -> None:
    page = visit.open()
    visit.context.set_offline(True)
    visit.upload("mine.jpg", photo)
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
    visit.context.set_offline(False)
    visit.shown("mine.jpg")
    expect(page.get_by_role("alert")).to_be_hidden()
    visit.end(allowed="ERR_INTERNET_DISCONNECTED")


def test_an_empty_gallery_says_so_and_fills(browser: Browser, serve: Callable[..., str], photo: bytes) -> None:
    visit = Visit(browser, start(serve, "--no-sample-gallery", "--no-keep-originals"))
    page = visit.page
    page.goto(visit.url)
    expect(page.locator("#gallery-note")).to_have_text("The gallery is empty.")
    visit.upload("mine.jpg", photo)
    visit.shown("mine.jpg")
    expect(page.locator("#neighbors-note")).to_contain_text("The gallery is empty")
    page.get_by_role("button", name="Add to the gallery").click()
    expect(page.locator("#neighbors-note")).to_contain_text("There is no other picture in the gallery.")
    visit.upload("mine too.jpg", photo)
    visit.shown("mine too.jpg")
    expect(page.locator("#neighbors li")).to_have_count(1)
    expect(page.locator("#vote")).to_contain_text("there is no vote")
    page.reload()
    visit.shown(hashlib.sha256(photo).hexdigest()[:32])  # by its thumbnail, which is all that was kept
    expect(page.locator("#attention-note")).to_contain_text("The brightest of")
    visit.end(allowed="status of 404")


def test_the_documentation_renders_without_a_network(visit: Visit) -> None:
    page = visit.page
    page.goto(f"{visit.url}/docs")
    expect(page.locator(".opblock-summary-path", has_text="/embed").first).to_be_visible()
    expect(page.locator(".opblock")).not_to_have_count(0)
    page.locator(".opblock-summary-path", has_text="/livez").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table .response .response-col_description")).to_contain_text("alive")
    visit.screenshot("docs", full_page=False)
    visit.end()
