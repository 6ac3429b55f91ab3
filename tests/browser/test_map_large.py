"""The map of as many pictures as it shows: 20,000, in a real Chromium."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from map_view import ask, painted, places, view
from playwright.sync_api import Browser, expect
from visit import Visit, encoders_of, start

COUNT, CLASSES = 20_000, 40
LONGEST_FRAME_S = 2.0  # a person who drags sees it move at all
# While the mouse drags: the time between two frames, in ms.
FRAMES = """() => {
    window.frames_ms = [];
    let last = performance.now();
    const tick = () => {
        const now = performance.now();
        window.frames_ms.push(now - last);
        last = now;
        requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
}"""


def planted(dim: int) -> np.ndarray:
    """float32 `(20000, dim)`: a heap for each label."""
    generator = np.random.default_rng(0)
    middles = generator.normal(size=(CLASSES, dim))
    return (middles[np.arange(COUNT) % CLASSES] + 0.5 * generator.normal(size=(COUNT, dim))).astype(np.float32)


@pytest.fixture
def url(serve: Callable[..., str], photo: bytes, tmp_path: Path) -> str:
    """A server whose gallery `many` holds them, brought as a Parquet file."""
    url = start(serve, "--no-sample-gallery", *encoders_of(tmp_path / "models", "dino-vit-cifar10"))
    httpx.post(f"{url}/gallery/images?gallery=one", content=photo, timeout=60).raise_for_status()
    schema = pq.read_schema(io.BytesIO(httpx.get(f"{url}/gallery/export?gallery=one").raise_for_status().content))
    vectors = planted(schema.field("embedding").type.list_size)
    columns: dict[str, Any] = {
        "id": [f"i{n:05}" for n in range(COUNT)],
        "label": [f"class {n % CLASSES:02}" for n in range(COUNT)],
        "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1]),
        "metadata": [json.dumps({})] * COUNT,
    }
    rows = pa.table([columns.get(f.name, pa.nulls(COUNT, f.type)) for f in schema], schema=schema)
    pq.write_table(rows, file := io.BytesIO())
    reply = httpx.post(f"{url}/gallery/import?gallery=many", content=file.getvalue(), timeout=120,
                       headers={"Content-Type": "application/vnd.apache.parquet"})  # fmt: skip
    assert reply.is_success, reply.text
    return url


def test_twenty_thousand_points(browser: Browser, url: str) -> None:
    visit = Visit(browser, url)
    page = visit.page
    page.goto(f"{url}/?gallery=many#/map")
    expect(page.locator("#plane[data-scale]")).to_be_visible()
    expect(page.locator("#map-how")).to_contain_text("20,000 pictures")
    reply = ask(url, method="pca", gallery="many")
    assert reply["shown"] == COUNT
    page.wait_for_timeout(1000)
    at = places(page, reply)
    assert (painted(visit, at) > 200).mean() > 0.99
    expect(page.locator("#map-legend button").first).to_be_visible()

    page.evaluate(FRAMES)
    box = page.locator("#plane").bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    for _ in range(4):
        page.mouse.wheel(0, -200)
        page.wait_for_timeout(50)
    page.mouse.down()
    for step in range(20):
        page.mouse.move(x + 6 * step, y + 3 * step)
    page.mouse.up()
    frames = np.array(page.evaluate("window.frames_ms")) / 1000
    print(f"{len(frames)} frames, median {np.median(frames):.3f} s, longest {frames.max():.3f} s")
    assert frames.max() < LONGEST_FRAME_S
    assert view(page)["scale"] > 0
    at = places(page, reply)
    inside = ((at > 5) & (at < [box["width"] - 5, box["height"] - 5])).all(axis=1)
    assert 0 < inside.sum() < COUNT
    assert (painted(visit, at[inside]) > 200).mean() > 0.99
    visit.screenshot("map-large", full_page=False)
    visit.end(allowed="404.*/thumbnail")  # vectors came without pictures
