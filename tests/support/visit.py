"""A person who comes to the page, in a browser that Playwright drives, and the server that they come to."""

import base64
import io
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, ViewportSize, expect

MODELS = Path(__file__).resolve().parents[2] / "model_repository"
# Read now: tests run in a folder of their own, without the person's variables.
SCREENSHOTS = Path(os.environ["PATCHSIGHT_SCREENSHOTS"]).resolve() if "PATCHSIGHT_SCREENSHOTS" in os.environ else None
DESKTOP, PHONE = ViewportSize(width=1280, height=900), ViewportSize(width=320, height=640)
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)
SAMPLES_COUNT = 200


def start(serve: Callable[..., str], *flags: object) -> str:
    if not any(MODELS.glob("*/encoder.json")):
        pytest.skip(f"no encoder in {MODELS}")
    # One engine: to try several takes longer than the tests.
    common = ("--model-repository", MODELS, "--threads", 1, "--drain-delay-s", 0, "--engine", "onnxruntime")
    return serve(*common, *flags)


def encoders_of(folder: Path, *names: str) -> list[object]:
    """Flags of a server that has these shipped encoders alone, the first by default."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).symlink_to(MODELS / name)
    return ["--model-repository", folder, "--encoder", names[0]]


def wait_for_samples(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        for _ in range(1800):
            if client.get("/gallery").json()["count"] == SAMPLES_COUNT:
                return
            time.sleep(0.1)
    raise AssertionError("the sample photos were not indexed")


class Visit:
    """A person at the page; remembers what they would not see: requests, and what the console says."""

    def __init__(self, browser: Browser, url: str, viewport: ViewportSize = DESKTOP, scheme: str = "light") -> None:
        self.url = url
        self.context: BrowserContext = browser.new_context(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
        self.context.set_default_timeout(PATIENCE_MS)
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda m: self._note(m) if m.type in ("error", "warning") else None)

    def _note(self, message: ConsoleMessage) -> None:
        self.problems.append(f"{message.text} ({message.location.get('url')})")

    def open(self, path: str = "/") -> Page:
        """Go there and wait until a picture is shown."""
        self.page.goto(self.url + path)
        expect(self.page.locator("#neighbors img[src]").first).to_be_visible()
        return self.page

    def upload(self, name: str, data: bytes) -> None:
        self.page.locator("#file").set_input_files({"name": name, "mimeType": "image/jpeg", "buffer": data})

    def shown(self, name: str) -> None:
        """Wait until this picture is the one on view."""
        expect(self.page.locator("#picture-name")).to_have_text(name)

    def pixels(self, selector: str = "#picture") -> np.ndarray:
        """uint8 `(h, w, 4)` of a canvas."""
        png = self.page.locator(selector).evaluate("canvas => canvas.toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(png.partition(",")[2]))).convert("RGBA"))

    def screenshot(self, name: str, full_page: bool = True) -> None:
        if SCREENSHOTS:
            self.page.mouse.move(0, 0)
            self.page.wait_for_timeout(500)  # transitions
            self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=full_page)

    def end(self, allowed: str | None = None) -> None:
        """Leave. Nothing was asked of anybody else, and the console has no complaint but `allowed`."""
        strangers = [u for u in self.requests if not u.startswith((self.url, "blob:", "data:"))]
        assert strangers == [], strangers
        complaints = [p for p in self.problems if not (allowed and re.search(allowed, p))]
        assert complaints == [], complaints
        self.context.close()


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    """An array as `/embed` has it in JSON."""
    return np.frombuffer(base64.b64decode(packed["data"]), "<f4").reshape(packed["shape"])


def ranks(map: np.ndarray) -> np.ndarray:
    """Each value's place in the order of all; equal ones stand as they come."""
    return np.argsort(np.argsort(map.ravel(), kind="stable"))


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()
