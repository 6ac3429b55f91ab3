"""Many pictures into the gallery: a few requests at a time, bad files named, a full or lost server waited for."""

import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageOps
from playwright.sync_api import Browser, FilePayload, Request, Route, expect
from visit import Visit, jpeg, start

from patchsight_serve.dataset import read_dataset
from patchsight_serve.sample_gallery import SAMPLES

AT_ONCE = 4
ADDING = re.compile(r"/gallery/images\?")


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    """Twenty small ones, all different."""
    samples = read_dataset(SAMPLES)
    opened = (Image.open(io.BytesIO(samples.read(i))).convert("RGB") for i in range(20))
    return [jpeg(ImageOps.mirror(image).resize((96, 96))) for image in opened]


@pytest.fixture(scope="module")
def url(shared_serve: Callable[..., str]) -> str:
    """A server without the sample gallery; each test has a gallery of its own."""
    return start(shared_serve, "--no-sample-gallery")


@pytest.fixture
def empty(browser: Browser, url: str, request: pytest.FixtureRequest) -> Visit:
    """A person at a gallery that is yet to be made."""
    visit = Visit(browser, url)
    visit.page.goto(f"{visit.url}/?gallery={request.node.name}")
    expect(visit.page.locator("#gallery-note")).to_have_text("The gallery is empty.")
    return visit


class InFlight:
    """How many additions were under way at the same time, at most."""

    def __init__(self, visit: Visit) -> None:
        self.now = self.most = 0
        visit.context.on("request", lambda request: self._count(request, 1))
        visit.context.on("requestfinished", lambda request: self._count(request, -1))
        visit.context.on("requestfailed", lambda request: self._count(request, -1))

    def _count(self, request: Request, change: int) -> None:
        if request.method == "POST" and ADDING.search(request.url):
            self.now += change
            self.most = max(self.most, self.now)


def files(photos: list[bytes]) -> list[FilePayload]:
    return [{"name": f"{i}.jpg", "mimeType": "image/jpeg", "buffer": data} for i, data in enumerate(photos)]


def stored(visit: Visit, **query: Any) -> list[dict[str, Any]]:
    query["gallery"] = visit.page.evaluate("new URLSearchParams(location.search).get('gallery')")
    images: list[dict[str, Any]] = httpx.get(f"{visit.url}/gallery/images", params=query).json()["images"]
    return images


def test_a_folder_goes_in_past_bad_files_and_a_full_server(empty: Visit, photos: list[bytes], tmp_path: Path) -> None:
    for i, data in enumerate(photos):
        file = tmp_path / "pictures" / ("cats" if i < 8 else "dogs") / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tmp_path / "pictures" / "cats" / "a <b>note.txt").write_text("no picture")
    (tmp_path / "pictures" / "half.jpg").write_bytes(photos[0][: len(photos[0]) // 2])
    page, flights, refused = empty.page, InFlight(empty), []

    def full(route: Route) -> None:
        if len(refused) >= 3:
            return route.continue_()
        refused.append(route.request.url)
        error = {"code": "overloaded", "message": "full", "param": None}
        return route.fulfill(status=429, headers={"Retry-After": "2"}, json={"error": error})

    page.route(ADDING, full)
    page.route("**/embed?*", lambda _: None)  # a bad file that is looked at first would drop out before
    page.locator("#folder").set_input_files(tmp_path / "pictures")
    expect(page.get_by_label("The name of its folder")).to_be_checked()
    page.get_by_role("button", name="Add all 22 to the gallery").click()
    expect(page.locator("#filling-wait")).to_have_text("The server is full, and asks to wait 2 seconds.")
    expect(page.locator("#filling-text")).to_have_text(re.compile(r"^\d+ of 22 pictures · 0\.\d MB of 0\.\d MB$"))
    expect(page.locator("#filling-text")).to_have_text("20 pictures added · 2 refused.")
    bad = page.locator("#bad-files li").all_inner_texts()
    assert sorted(text.partition(": ")[0] for text in bad) == ["pictures/cats/a <b>note.txt", "pictures/half.jpg"]
    assert "not an image format we read" in " ".join(bad)
    expect(page.locator("#gallery-note")).to_contain_text("20 pictures")
    assert flights.most == AT_ONCE
    empty.screenshot("filled")

    images = stored(empty)
    assert sorted((image["label"], image["metadata"]["path"]) for image in images) == sorted(
        (label, f"pictures/{label}/{i}.jpg") for i in range(20) for label in ["cats" if i < 8 else "dogs"]
    )
    empty.end(allowed=r"status of (404|415|422|429)|ERR_FILE_NOT_FOUND")


def drop(visit: Visit, *paths: Path) -> None:
    """As the file manager of a person does, over the middle of the page."""
    devtools = visit.context.new_cdp_session(visit.page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 600, "y": 400, "data": data})


def test_folders_are_dropped(empty: Visit, photos: list[bytes], tmp_path: Path) -> None:
    """Folders in folders, more files than a browser tells at a time, a file beside them, what systems leave there."""
    for i in range(130):
        file = tmp_path / "pictures" / ("cats" if i < 120 else "dogs/small") / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photos[i % 20] + bytes([i]))  # bytes behind a picture's end make another file of it
    (tmp_path / "pictures" / ".hidden").write_text("no picture")
    (tmp_path / "pictures" / "cats" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "alone.jpg").write_bytes(photos[0] + b"alone")
    page = empty.page
    page.route("**/embed?*", lambda _: None)
    drop(empty, tmp_path / "pictures", tmp_path / "alone.jpg")
    expect(page.get_by_label("The name of its folder")).to_be_checked()
    page.get_by_role("button", name="Add all 131 to the gallery").click()
    expect(page.locator("#filling-text")).to_have_text("131 pictures added.")
    found = httpx.get(f"{empty.url}/gallery", params={"gallery": "test_folders_are_dropped"}).json()
    assert found["count"] == 131
    assert Counter(image["label"] for image in stored(empty, limit=200)) == {"cats": 120, "small": 10, None: 1}
    empty.end(allowed=r"status of 404")


# No permission keeps root from reading, so the browser's entries are had to fail: a file "gone.jpg", a folder "locked".
UNREADABLE = """() => {
    const fail = (_, failed) => failed(new DOMException("not to be read", "NotReadableError"));
    const { webkitGetAsEntry } = DataTransferItem.prototype;
    DataTransferItem.prototype.webkitGetAsEntry = function () {
        const folder = webkitGetAsEntry.call(this);
        const { createReader } = folder;
        folder.createReader = () => {
            const reader = createReader.call(folder);
            const { readEntries } = reader;
            reader.readEntries = (done, failed) => readEntries.call(reader, (entries) => {
                for (const entry of entries) {
                    if (entry.name === "gone.jpg") entry.file = fail;
                    if (entry.name === "locked") entry.createReader = () => ({ readEntries: fail });
                }
                done(entries.sort((a, b) => a.name.localeCompare(b.name))); // one that can be read is looked at first
            }, failed);
            return reader;
        };
        return folder;
    };
}"""


def test_what_cannot_be_read_of_a_folder_is_named_and_harms_nothing(
    empty: Visit, photos: list[bytes], tmp_path: Path
) -> None:
    for name in ("a.jpg", "gone.jpg", "locked/b.jpg", "open/c.jpg"):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photos[len(name)])
    page = empty.page
    page.evaluate(UNREADABLE)
    page.route("**/embed?*", lambda _: None)
    drop(empty, tmp_path / "pictures")
    page.get_by_role("button", name="Add all 4 to the gallery").click()
    expect(page.locator("#filling-text")).to_have_text("2 pictures added · 2 refused.")
    bad = page.locator("#bad-files li").all_inner_texts()
    why = "the browser cannot read this file"
    assert sorted(bad) == [f"pictures/gone.jpg: {why}", f"pictures/locked: {why}"]
    assert {image["metadata"]["path"] for image in stored(empty)} == {"pictures/a.jpg", "pictures/open/c.jpg"}
    empty.end(allowed=r"status of 404")


def test_a_lost_server_is_waited_for_and_the_rest_can_be_canceled(empty: Visit, photos: list[bytes]) -> None:
    page = empty.page
    page.locator("#file").set_input_files(files(photos))
    empty.shown("0.jpg")
    page.get_by_label("A label for all of them").fill("mine")
    empty.context.set_offline(True)
    page.get_by_role("button", name="Add all 20 to the gallery").click()
    expect(page.locator("#filling-wait")).to_contain_text("The server does not answer.")
    held: list[Route] = []
    page.route(ADDING, lambda route: held.append(route) if len(held) < 2 else route.continue_())
    empty.context.set_offline(False)
    expect(page.locator("#filling-text")).to_contain_text("18 of 20 pictures")  # two requests hang, the others go on
    page.get_by_role("button", name="Cancel", exact=True).first.click()
    expect(page.locator("#filling-text")).to_have_text("18 pictures added · 2 not added, as you canceled.")
    page.get_by_role("button", name="Add all 2 to the gallery").click()
    expect(page.locator("#filling-text")).to_have_text("2 pictures added.")
    labels = {image["label"] for image in stored(empty)}
    assert labels == {"mine"}
    empty.end(allowed=r"ERR_INTERNET_DISCONNECTED|ERR_FAILED")


def test_what_concerns_all_stops_all(empty: Visit, photos: list[bytes]) -> None:
    page = empty.page
    error = {"code": "storage_full", "message": "no space left", "param": None}
    page.route(ADDING, lambda route: route.fulfill(status=507, json={"error": error}))
    page.locator("#file").set_input_files(files(photos[:9]))
    page.get_by_role("button", name="Add all 9 to the gallery").click()
    expect(page.get_by_role("alert")).to_contain_text("The server's disk is full. no space left")
    expect(page.locator("#filling-text")).to_have_text("0 pictures added · 9 not added.")
    page.unroute(ADDING)
    page.get_by_role("button", name="Add all 9 to the gallery").click()
    expect(page.locator("#filling-text")).to_have_text("9 pictures added.")
    empty.end(allowed="status of 507")
