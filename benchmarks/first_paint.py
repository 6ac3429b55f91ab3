"""How soon does a person see something? Visits of the page by a Chromium on the same machine, each with an empty cache.

    python benchmarks/first_paint.py             # a minute; needs `chromium` on the PATH, and better nobody else here

A server of its own, with the shipped encoders and the sample gallery. Measured by the browser from the moment that it
begins to load the page: the first paint of any text (first contentful paint), and the picture with the attention on it
and its neighbors below (where the encoder has been asked, and the gallery). Bytes are those that came over the line.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import pyarrow.parquet as pq
from measure import ROOT, commit, hardware, publish, save
from playwright.sync_api import Browser, sync_playwright
from triton_process import free_port

from patchsight_serve.sample_gallery import SAMPLES

START_S = 300
VISITS = 20
# In the page, before its own scripts: the moment at which the picture's view is there to be seen.
WATCH = """new MutationObserver((_, observer) => {
    if (!document.getElementById("view")?.checkVisibility()) return;
    observer.disconnect();
    requestAnimationFrame(() => (window.pictureShown = performance.now()));
}).observe(document, { attributes: true, childList: true, subtree: true });"""
READ = """() => {
    const all = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")];
    const bytes = (entries) => entries.reduce((sum, entry) => sum + entry.transferSize, 0);
    return {
        first_paint_ms: performance.getEntriesByName("first-contentful-paint")[0].startTime,
        picture_shown_ms: window.pictureShown,
        page_bytes: bytes(all.filter(({ name }) => name.endsWith("/") || name.includes("/static/"))),
        all_bytes: bytes(all),
        requests: all.length,
    };
}"""


def visit(browser: Browser, url: str) -> dict[str, float]:
    """One of a person who was never here."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(WATCH)
    page = context.new_page()
    page.goto(url)
    page.locator("#neighbors img[src]").first.wait_for()
    page.wait_for_load_state("networkidle")
    seen: dict[str, float] = page.evaluate(READ)
    context.close()
    return seen


def measure(url: str, visits: int) -> dict[str, Any]:
    """By figure: median, tenth and ninetieth percentile of all visits but the first, which warms the server."""
    with sync_playwright() as playwright:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        seen = [visit(browser, url) for _ in range(visits + 1)][1:]
        version = browser.version
        browser.close()
    figures = {name: spread([one[name] for one in seen]) for name in seen[0]}
    return {"visits": visits, "chromium": version, "figures": figures}


def spread(values: list[float]) -> dict[str, float]:
    tenths = quantiles(values, n=10, method="inclusive")
    return {"median": round(median(values), 1), "p10": round(tenths[0], 1), "p90": round(tenths[-1], 1)}


def ready(url: str) -> None:
    """Wait until the sample gallery is complete. Raises RuntimeError."""
    count = pq.read_metadata(SAMPLES).num_rows
    for _ in range(START_S):
        try:
            if httpx.get(f"{url}/gallery").json()["count"] >= count:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise RuntimeError(f"{url} had no sample gallery after {START_S} s")


def table(result: dict[str, Any]) -> str:
    figures = result["figures"]

    def row(name: str, key: str, unit: str, scale: float = 1) -> str:
        middle, low, high = (figures[key][part] / scale for part in ("median", "p10", "p90"))
        return f"| {name} | {f'{middle:,.0f} {unit}'.strip()} | {low:,.0f} to {high:,.0f} |"

    return "\n".join(
        [
            "| | median | 10 % to 90 % of the visits |",
            "| --- | --- | --- |",
            row("first text", "first_paint_ms", "ms"),
            row("picture, attention and neighbors", "picture_shown_ms", "ms"),
            row("the page itself: HTML, styles, scripts, icon", "page_bytes", "kB", 1000),
            row("with all pictures and answers", "all_bytes", "kB", 1000),
            row("requests", "requests", ""),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visits", type=int, default=VISITS)
    visits: int = parser.parse_args().visits
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        program = str(Path(sys.executable).parent / "patchsight-serve")
        with (Path(folder) / "log").open("wb") as log:
            flags = ["--port", str(port), "--state-dir", folder, "--model-repository", str(ROOT / "model_repository")]
            server = subprocess.Popen([program, *flags], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}/"
            ready(url.rstrip("/"))
            result = measure(url, visits)
        finally:
            server.terminate()
            server.wait()
    save("first_paint", result)
    publish("first_paint", f"{table(result)}\n\n{visits} visits, {hardware()}, commit {commit()}.")
    print(table(result))


if __name__ == "__main__":
    main()
