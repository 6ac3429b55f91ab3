"""A real Chromium, a real server with the shipped encoders and its sample gallery, and a person who comes to see."""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

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


@pytest.fixture(scope="session")
def samples(
    serve_in: Callable[[Path], AbstractContextManager[Callable[..., str]]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], tuple[str, Path]]:
    """`start(serve, *samples())`: a server whose sample gallery is complete. The photos were embedded once, by the
    default encoder; each call gives a copy."""
    folder = tmp_path_factory.mktemp("samples")
    with serve_in(folder) as serve:
        wait_for_samples(start(serve))

    def copy() -> tuple[str, Path]:
        state = tmp_path_factory.mktemp("state") / "state"
        return "--state-dir", shutil.copytree(folder / "state", state)

    return copy


@pytest.fixture(scope="module")
def url(shared_serve: Callable[..., str], samples: Callable[[], tuple[str, Path]]) -> str:
    """A server whose sample gallery is complete. Tests that use it leave the gallery as it is."""
    return start(shared_serve, *samples())


@pytest.fixture
def visit(browser: Browser, url: str) -> Visit:
    """A person who comes to the page with a desktop computer."""
    return Visit(browser, url)


@pytest.fixture(scope="module")
def photo() -> bytes:
    """A photo that is not in the gallery, though one like it is: JPEG, portrait."""
    sample = Image.open(io.BytesIO(read_dataset(SAMPLES).read(7)))
    return jpeg(ImageOps.mirror(sample.convert("RGB")))
