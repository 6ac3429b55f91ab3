"""The map as a browser shows it: which part is on view, where each image is, and what is painted there."""

from typing import Any

import httpx
import numpy as np
from playwright.sync_api import Page
from visit import Visit


def ask(url: str, **query: Any) -> dict[str, Any]:
    return httpx.get(f"{url}/gallery/map", params=query, timeout=60).raise_for_status().json()


def view(page: Page) -> dict[str, float]:
    """Which part of the plane is on view: its middle, and pixels per unit."""
    page.wait_for_timeout(400)  # it says so when it rests
    told = page.locator("#plane").evaluate("canvas => ({...canvas.dataset})")
    return {name: float(value) for name, value in told.items()}


def places(page: Page, reply: dict[str, Any]) -> np.ndarray:
    """Where on the canvas, in pixels, each image is `(N, 2)`."""
    seen, box = view(page), page.locator("#plane").bounding_box()
    assert box
    x = (np.array(reply["xs"]) - seen["x"]) * seen["scale"] + box["width"] / 2
    y = (seen["y"] - np.array(reply["ys"])) * seen["scale"] + box["height"] / 2
    return np.stack([x, y], axis=1)


def painted(visit: Visit, at: np.ndarray) -> np.ndarray:
    """Opacity of the canvas at places `(N, 2)`, 0 to 255."""
    pixels = visit.pixels("#plane")
    x, y = at.round().astype(int).T
    return pixels[y.clip(0, len(pixels) - 1), x.clip(0, pixels.shape[1] - 1), 3]
