"""A run's report in a real Chromium, opened from the disk as people open it, without any network."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, ViewportSize, expect
from visit import SCREENSHOTS

from patchsight_serve.dataset import read_dataset
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_train.report import write_report

VIEWPORTS = {
    "phone": ViewportSize(width=320, height=640),
    "desktop": ViewportSize(width=1280, height=900),
    "large": ViewportSize(width=2560, height=1440),
}
PER_EPOCH, EPOCHS, STEPS = 195, 100, 8300
CONFIG = {
    "objective": "dino", "data": ["photos"], "dataset": "a folder of photos", "backbone": "vit-tiny", "image_size": 32,
    "patch_size": 4, "prototypes": 4096, "epochs": EPOCHS, "batch_size": 256, "commit": "0123456789ab",
    "torch": "2.15.0",
}  # fmt: skip
WARNING = "teacher_mean_entropy fell to 0.02: one prototype for all. Raise --teacher-momentum to 0.9995"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINO run at two fifths of its way, with a warning, two skipped steps and pictures."""
    run = tmp_path_factory.mktemp("runs") / "dino-photos"
    (run / "pictures").mkdir(parents=True)
    (run / "config.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in CONFIG.items()))
    rng = np.random.default_rng(5)
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(row(step, rng)) + "\n" for step in range(1, STEPS + 1))
    for i, (name, rows) in enumerate((("views", 4), ("reconstructions", 3), ("attention", 3), ("neighbors", 5))):
        sheet(rows, 7, i).save(run / "pictures" / f"{name}.png")
    write_report(run)
    return run


def row(step: int, rng: np.random.Generator) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    p, noise = step / (PER_EPOCH * EPOCHS), rng.normal(size=6)
    values: dict[str, Any] = {
        "step": step, "epoch": round(step / PER_EPOCH, 4), "loss": math.log(4096) * math.exp(-p) + 0.08 * noise[0],
        "teacher_entropy": 8.3 * math.exp(-2 * p) + 0.1 * noise[1], "teacher_mean_entropy": 8.2 - p + 0.05 * noise[2],
        "teacher_temperature": 0.04 + 0.03 * min(3 * p, 1), "gradient_norm": math.exp(0.3 * noise[3]),
        "lr": 5e-4 * min(p * 10, 1) * (1 + math.cos(math.pi * p)) / 2, "weight_decay": 0.4 - 0.36 * math.cos(1.5 * p),
        "images_per_s": round(820 + 25 * noise[4], 1),
    }  # fmt: skip
    if step in (5000, 5040):
        values |= {"loss": None, "gradient_norm": None, "skipped": 1.0}
    if step == 4 * 5 * PER_EPOCH:
        values["warning"] = WARNING
    if step % (5 * PER_EPOCH) == 0:
        grown = 1 - math.exp(-5 * p)
        values |= {
            "knn": 0.2 + 0.45 * grown, "linear_probe": 0.25 + 0.45 * grown, "rankme": 20 + 100 * p,
            "alignment": 0.9 - 0.5 * p + 0.02 * noise[5], "uniformity": -1.5 - 2 * p, "feature_std": 0.4 + 0.5 * p,
        }  # fmt: skip
    return values


def sheet(rows: int, columns: int, first: int) -> Image.Image:
    """A grid of sample photos, as evaluations draw them."""
    samples = read_dataset(SAMPLES)
    grid = Image.new("RGB", (columns * 130 - 2, rows * 130 - 2), "gray")
    for i in range(rows * columns):
        photo = Image.open(io.BytesIO(samples.read(31 * first + i))).convert("RGB").resize((128, 128))
        grid.paste(photo, (i % columns * 130, i // columns * 130))
    return grid


class Visit:
    """Somebody who opens the file, cut off from every network."""

    def __init__(self, browser: Browser, run: Path, size: str = "desktop", scheme: str = "light") -> None:
        self.context = browser.new_context(viewport=VIEWPORTS[size], color_scheme=scheme)  # type: ignore[arg-type]
        self.context.route("**/*", self.only_the_file)
        self.page: Page = self.context.new_page()
        self.strangers: list[str] = []
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.goto((run / "report.html").as_uri())

    def only_the_file(self, route: Route) -> None:
        url = route.request.url
        if url.startswith(("data:", "file:")) and (url.startswith("data:") or url.endswith("/report.html")):
            route.continue_()
        else:
            self.strangers.append(url)
            route.abort()

    def screenshot(self, name: str) -> None:
        if SCREENSHOTS:
            self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    def end(self) -> None:
        assert (self.strangers, self.problems) == ([], [])
        self.context.close()


@pytest.mark.parametrize(("size", "scheme"), [("phone", "light"), ("desktop", "dark"), ("large", "light")])
def test_the_report_fits_every_screen_and_theme(browser: Browser, run: Path, size: str, scheme: str) -> None:
    visit = Visit(browser, run, size, scheme)
    page = visit.page
    expect(page.locator("h1")).to_have_text("dino-photos")
    expect(page.locator(".warnings")).to_contain_text(WARNING)
    expect(page.locator(".tiles")).to_contain_text("Skipped steps2")
    width = VIEWPORTS[size]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(paper) < 200) == (scheme == "dark")
    for picture in page.locator(".pictures img").all():
        picture.scroll_into_view_if_needed()
        natural, shown = picture.evaluate("image => [image.naturalWidth, image.clientWidth]")
        assert natural == 7 * 130 - 2
        assert 480 <= shown <= natural  # on a phone it is moved sideways in its frame
    # Text is as large on every screen, and inside of it.
    texts = page.evaluate(
        """[...document.querySelectorAll(".plot text")].map(text => {
            const box = text.getBoundingClientRect();
            return [box.left, box.right, parseFloat(getComputedStyle(text).fontSize)];
        })"""
    )
    assert len(texts) > 80
    for left, right, size_px in texts:
        assert left >= 0
        assert right <= width
        assert size_px >= 11
    visit.screenshot(f"report-{size}-{scheme}")
    visit.end()


def test_lines_fill_their_charts(browser: Browser, run: Path) -> None:
    visit = Visit(browser, run)
    boxes = visit.page.evaluate(
        """[...document.querySelectorAll(".plot[data-x]")].map(plot => {
            const box = plot.firstElementChild.getBoundingClientRect();
            const lines = [...plot.querySelectorAll(".curve")].map(path => path.getBoundingClientRect());
            return [box.width, box.height, Math.min(...lines.map(l => l.left - box.left)),
                    Math.max(...lines.map(l => l.right - box.right))];
        })"""
    )
    assert len(boxes) >= 9
    for width, height, left, right in boxes:
        assert width > 200
        assert height > 150
        assert left >= -2
        assert right <= 2
    visit.end()


def test_the_value_under_the_pointer_is_told(browser: Browser, run: Path) -> None:
    visit = Visit(browser, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "knn" in line]
    chart = visit.page.locator(".chart", has_text="Classes from frozen features")
    before = chart.locator("output").inner_text()
    plot = chart.locator(".plot > svg")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box
    for share in (0.25, 0.5, 0.9):
        visit.page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        found = re.fullmatch(r"epoch (\S+) · 20-NN (\S+) · linear probe (\S+)", chart.locator("output").inner_text())
        assert found
        nearest = min(evaluated, key=lambda line, at=share: abs(line["step"] / STEPS - at))
        expected = [nearest["epoch"], 100 * nearest["knn"], 100 * nearest["linear_probe"]]
        assert [float(x) for x in found.groups()] == pytest.approx(expected, rel=2e-3)
        expect(chart.locator(".cursor")).to_have_count(1)
    visit.page.mouse.move(0, 0)
    expect(chart.locator("output")).to_have_text(before)
    expect(chart.locator(".cursor")).to_have_count(0)
    visit.end()


def test_it_can_be_read_without_scripts(browser: Browser, run: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((run / "report.html").as_uri())
    expect(page.locator(".chart")).to_have_count(11)
    expect(page.locator(".chart output").first).to_have_text(re.compile(r"\d\.\d+"))
    page.get_by_text("Settings: config.toml").click()
    expect(page.locator("pre")).to_contain_text('objective = "dino"')
    context.close()
