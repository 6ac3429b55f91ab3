"""A real Chromium, a real server with the shipped encoders and its sample gallery, and a person who comes to see."""

import io
import shutil
from collections.abc import Callable, Iterator

import pytest
from PIL import Image, ImageOps
from playwright.sync_api import Browser, sync_playwright
from visit import Visit, jpeg, start, wait_for_samples

from patchsight_serve.dataset import read_dataset
from patchsight_serve.sample_gallery import SAMPLES

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",  # a camera, and a person who allows it
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. One per module, not per session: while it is open, no other test could run an event loop."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no `chromium` on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(shared_serve: Callable[..., str]) -> str:
    """A server whose sample gallery is complete. Tests that use it leave the gallery as it is."""
    url = start(shared_serve)
    wait_for_samples(url)
    return url


@pytest.fixture
def visit(browser: Browser, url: str) -> Visit:
    """A person who comes to the page with a desktop computer."""
    return Visit(browser, url)


@pytest.fixture(scope="module")
def photo() -> bytes:
    """A photo that is not in the gallery, though one like it is: JPEG, portrait."""
    sample = Image.open(io.BytesIO(read_dataset(SAMPLES).read(7)))
    return jpeg(ImageOps.mirror(sample.convert("RGB")))
