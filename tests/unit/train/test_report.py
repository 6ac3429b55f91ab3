"""The page of a run folder, parsed; tests/browser/test_report.py opens it."""

import base64
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from patchsight_serve.errors import InvalidRequest
from patchsight_train.report import write_report
from patchsight_train.run import open_run

CONFIG = {
    "objective": "dino", "data": ["photos"], "dataset": "holiday <photos>", "backbone": "vit-tiny", "image_size": 32,
    "patch_size": 4, "prototypes": 4096, "epochs": 10, "batch_size": 64, "commit": "0123456789ab", "torch": "2.15.0",
}  # fmt: skip
EVALUATION = {"knn": 0.5, "linear_probe": 0.6, "rankme": 33.0, "alignment": 0.6, "uniformity": -2.0, "feature_std": 0.7}


def write_run(run: Path, steps: int = 100, config: dict[str, Any] | None = None, labels: bool = True) -> Path:
    """A run of 20 steps an epoch, evaluated after each."""
    open_run(run, CONFIG | (config or {}))
    rows = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {
            "step": step, "epoch": round(step / 20, 4), "loss": 8 / step, "lr": 1e-3, "gradient_norm": 1.0,
            "teacher_entropy": 4.0, "images_per_s": 640.0,
        }  # fmt: skip
        if step % 20 == 0:
            row |= {k: v for k, v in EVALUATION.items() if labels or k not in ("knn", "linear_probe")}
        rows.append(row)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def picture(size: tuple[int, int], seed: int) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").rotate(seed).resize(size).save(file, "PNG")
    return file.getvalue()


class Page(HTMLParser):
    """What a browser would make of it: elements that were opened, the text, and whether all were closed."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.source = (run / "report.html").read_text()
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(run: Path) -> Page:
    write_report(run)
    return Page(run)


def test_a_run_in_progress(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "my-run"))
    assert "my-run" in page.text
    assert "DINO, arXiv:2104.14294: a student matches" in page.text
    assert "Epoch 5 of 10 · step 100 of 200 · 640 images/s · about 10 s left" in page.text
    assert "ViT, 12 blocks, width 192, 3 heads, patches of 4 in 32 px" in page.text
    assert "holiday <photos>" in page.text
    assert "0123456789ab, torch 2.15.0" in page.text
    assert {"http-equiv": "refresh", "content": "15"} in page.all("meta")
    assert "<title>50 % · my-run</title>" in page.source
    for title in ("Loss", "Entropy of the teacher", "Classes from frozen features", "Effective rank", "Learning rate",
                  "Alignment and uniformity", "Gradient norm", "Speed"):  # fmt: skip
        assert f"<h3>{title}</h3>" in page.source
    references = [float(str(a["data-value"])) for a in page.all("g") if a.get("class") == "reference"]
    assert math.log(4096) in references


def test_the_settings_are_in_it_as_they_were_written(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, config={"note": "a <b> & 'c'"}))
    assert (tmp_path / "config.toml").read_text() in page.text
    assert page.all("details") == [{}]


def test_a_complete_run_does_not_refresh(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, steps=200))
    assert not [meta for meta in page.all("meta") if meta.get("http-equiv") == "refresh"]
    assert "Complete: 10 epochs · 200 steps" in page.text
    before = report(write_run(tmp_path, steps=199))
    assert [meta for meta in before.all("meta") if meta.get("http-equiv") == "refresh"]


def test_nothing_is_asked_of_anybody(tmp_path: Path) -> None:
    run = write_run(tmp_path, config={"dataset": "https://example.com/data.zip", "data": ["https://example.com/a"]})
    (run / "pictures").mkdir()
    (run / "pictures" / "views.png").write_bytes(picture((8, 8), 0))
    page = report(run)
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "video", "audio", "base", "form", "image", "use", "source")
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "xlink:href", "data", "action", "poster"):
                assert str(value).startswith("data:")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", page.source)
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy[0]).startswith("default-src 'none'; img-src data:;")
    # The names of the data are text, and the icon's namespace is a name.
    assert "https://example.com" not in re.sub(r">[^<]*<", "><", page.source)


def test_no_text_becomes_html(tmp_path: Path) -> None:
    evil = "</style></script><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    run = write_run(tmp_path / "a<b>&c", config={"dataset": evil, "data": [evil], "commit": evil, "init": evil})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 101, "epoch": 5.05, "warning": evil, f"odd{evil}": 1.0}) + "\n")
    (run / "pictures").mkdir()
    (run / "pictures" / "<img src=x>.png").write_bytes(picture((8, 8), 0))
    page = report(run)
    assert len(page.all("script")) == 1
    assert all(str(image["src"]).startswith("data:") for image in page.all("img"))
    assert evil in page.text
    assert "a<b>&c" in page.text


def test_pictures_are_inlined_with_captions(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "pictures").mkdir()
    files = {name: picture((40 + i, 20), i) for i, name in enumerate(("zebra", "neighbors", "views", "attention"))}
    for name, png in files.items():
        (run / "pictures" / f"{name}.png").write_bytes(png)
    page = report(run)
    images = page.all("img")
    assert [image["alt"] for image in images] == ["views", "attention", "neighbors", "zebra"]
    for image in images:
        data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
        assert data == files[str(image["alt"])]
        assert (int(str(image["width"])), int(str(image["height"]))) == Image.open(io.BytesIO(data)).size
    assert "Nearest neighbors: pictures, and those whose embeddings are most similar" in page.text


@pytest.mark.parametrize("damage", [b"", b"\x89PNG", b"GIF89a", picture((64, 64), 3)[:-20]])
def test_a_picture_that_is_not_whole_is_left_out(tmp_path: Path, damage: bytes) -> None:
    run = write_run(tmp_path)
    (run / "pictures").mkdir()
    (run / "pictures" / "views.png").write_bytes(damage)
    (run / "pictures" / "attention.png").write_bytes(picture((8, 8), 1))
    assert [image["alt"] for image in report(run).all("img")] == ["attention"]


def test_without_labels_there_is_no_knn(tmp_path: Path) -> None:
    page = report(write_run(tmp_path, labels=False))
    assert "20-NN" not in page.text
    assert "Effective rank" in page.text


def test_missing_parts_are_left_out(tmp_path: Path) -> None:
    empty = report(tmp_path)
    assert "Nothing is logged yet." in empty.text
    assert "config.toml is missing" in empty.text
    assert {"http-equiv": "refresh", "content": "15"} in empty.all("meta")
    (tmp_path / "config.toml").write_text("objective = \n<half")
    assert "<half" in report(tmp_path).text
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "loss": 3.0}\n{"step": 2, "epo')
    page = report(tmp_path)
    assert "Epoch 0.1 · step 1" in page.text
    nonsense = 'objective = 3\nepochs = "x"\nbatch_size = []\nbackbone = 1\ndata = "photos"\n'
    (tmp_path / "config.toml").write_text(nonsense)
    assert "Epoch 0.1 · step 1" in report(tmp_path).text
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe")
    assert "config.toml is missing" in report(tmp_path).text


def test_one_step_makes_a_page(tmp_path: Path) -> None:
    assert "Epoch 0.05 of 10 · step 1 of 200" in report(write_run(tmp_path, steps=1)).text


def test_values_that_are_not_finite_make_a_page(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG)
    names = ("loss", "lr", "images_per_s", *EVALUATION)
    values = (math.nan, math.inf, -math.inf, 1e308, -1e308, 0.0, 5e-324)
    rows = [{"step": i, "epoch": i / 20, **dict.fromkeys(names, x), "skipped": 1.0} for i, x in enumerate(values, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report(tmp_path)
    assert "nan" not in "".join(str(path["d"]) for path in page.all("path"))


def test_warnings_stand_before_everything_else(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 101, "epoch": 5.05, "loss": 1.0, "warning": "all alike: raise --lr"}) + "\n")
    text = report(run).text
    assert "all alike: raise --lr" in text
    assert text.index("all alike") < text.index("Objective")
    assert "signs of collapse" not in report(write_run(run)).text


def test_same_folder_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a" / "run")
    write_report(run)
    first = (run / "report.html").read_bytes()
    time.sleep(0.01)
    copy = shutil.copytree(run, tmp_path / "b" / "run")
    os.utime(copy / "metrics.jsonl", (0, 0))
    for folder in (run, copy):
        write_report(folder)
        assert (folder / "report.html").read_bytes() == first
    assert sorted(p.name for p in run.iterdir()) == ["config.toml", "metrics.jsonl", "report.html"]


def test_a_kill_while_writing_leaves_the_old_report(tmp_path: Path) -> None:
    """The process ends by itself in the middle of the file's bytes, as a kill would end it."""
    run = write_run(tmp_path)
    write_report(run)
    before = (run / "report.html").read_bytes()
    write_run(run, steps=120)
    program = f"""
import os
from pathlib import Path
from patchsight_train.report import write_report

def half(path, text, encoding=None):
    with path.open("w") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        os._exit(9)

Path.write_text = half
write_report(Path({str(run)!r}))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert (run / "report.html").read_bytes() == before
    page = report(run)  # what the kill left behind is no obstacle
    assert "step 120 of 200" in page.text
    assert not list(run.glob("*.partial"))


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path)
    write_report(run)
    before = (run / "report.html").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_what_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="nowhere: not a run folder"):
        write_report(tmp_path / "nowhere")


def test_charts_hold_what_was_logged(tmp_path: Path) -> None:
    """End to end: the k-NN that was written is read back from the page's own curve."""
    page = report(write_run(tmp_path))
    (path,) = [path for path in page.all("path") if path.get("data-name") == "20-NN"]
    places = [element.get("data-name") or element.get("data-y") for _, element in page.elements]
    axis = str([place for place in places[: places.index("20-NN")] if place][-1])  # of the chart that the line is in
    low, high, log = (float(x) for x in axis.split())
    points = [tuple(map(float, pair.split())) for pair in str(path["d"]).removeprefix("M").split("L")]
    assert [x / 1000 * 100 for x, _ in points] == pytest.approx([20, 40, 60, 80, 100])
    assert [low + (1 - y / 1000) * (high - low) for _, y in points] == pytest.approx([50.0] * 5, abs=0.01)
    assert not log


def test_reports_need_no_torch() -> None:
    program = "import sys, patchsight_train.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
