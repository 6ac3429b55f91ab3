"""The README's requests work as printed, against the shipped encoder and the sample gallery."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PRINTED = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url(shared_serve: Callable[..., str]) -> str:
    """A server with the shipped encoders whose sample gallery is complete; what the README adds goes to other ones."""
    # One engine: to try several takes longer than the tests.
    address = shared_serve("--model-repository", ROOT / "model_repository", "--engine", "onnxruntime")
    deadline = time.monotonic() + 180
    while httpx.get(f"{address}/gallery").json()["count"] < 200:
        assert time.monotonic() < deadline, "the sample photos were not indexed"
        time.sleep(0.2)
    return address


def test_requests(url: str, tmp_path: Path, readme_commands: Callable[[Path], list[str]]) -> None:
    asking = ("curl ", "patchsight-embed photos/ --gallery")
    lines = [line for line in readme_commands(ROOT / "README.md") if line.startswith(asking)]
    assert len(lines) >= 10
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    (tmp_path / "photos").mkdir()
    for photo in (ROOT / "docs" / "images").glob("*.jpg"):
        (tmp_path / "photos" / photo.name).write_bytes(photo.read_bytes())
    (tmp_path / "photos" / "bad.jpg").write_text("a text")
    here = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    replies = []
    for line in lines:
        assert PRINTED in line
        asked = line.replace(PRINTED, url).replace("curl -s", "curl -sS --fail-with-body")
        result = subprocess.run(asked, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=here)
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
        replies.append(result.stdout)
    embedded, drawn, neighbors, added, form, mine, filled, among, region, duplicates, clusters = replies
    (result,) = json.loads(embedded)["results"]
    assert len(result["embedding"]) == 384  # CLS and mean side by side
    assert drawn == ""
    with Image.open(tmp_path / "attention.png") as picture:
        assert picture.format == "PNG"
    found = json.loads(neighbors)
    assert [n["label"] for n in found["neighbors"]][0]
    assert len(found["neighbors"]) == 3
    assert found["vote"]["label"]
    assert json.loads(added)["results"][0] == {"index": 0, "id": "shoes-1", "created": True}
    assert [r["created"] for r in json.loads(form)["results"]] == [True, True]
    assert json.loads(mine)["neighbors"][0]["score"] == pytest.approx(1, abs=1e-5)  # the same photo under another id
    photos = len(list((tmp_path / "photos").iterdir())) - 1
    assert filled == f"gallery photos: {photos} images are new, 0 were there\n"
    assert (tmp_path / "photos.skipped.jsonl").read_text().startswith('{"name": "bad.jpg"')
    best, *others = json.loads(among)["neighbors"]
    assert best["metadata"] == {"path": "shoes.jpg"}
    assert best["score"] == pytest.approx(1, abs=1e-5)
    assert len(others) == min(5, photos) - 1
    found = json.loads(region)
    assert (found["looked_at"], len(found["neighbors"])) == (20, 10)
    assert all(0 <= n["box"][0] < n["box"][2] <= 1 for n in found["neighbors"])
    (group,) = json.loads(duplicates)["groups"]
    assert group["id"] in {m["id"] for m in group["members"]}
    assert [m["copy_of"] for m in group["members"]].count(None) == 1
    assert "shoes-1" in {m["id"] for m in group["members"]}
    found = json.loads(clusters)
    assert (found["images"], len(found["clusters"])) == (200, 10)
    assert all(len(cluster["typical"]) == min(9, cluster["size"]) for cluster in found["clusters"])


def test_printed_answers(url: str, readme_answers: list[str]) -> None:
    """The answers that the README prints are the answers (shortened by `…`): same encoder, same ids, same scores."""
    photo = (ROOT / "docs" / "images" / "shoes.jpg").read_bytes()
    embedded, neighbors = readme_answers
    encoder = next(e for e in httpx.get(f"{url}/encoders").json()["encoders"] if e["default"])
    assert encoder["sha256"] in embedded
    actual = httpx.post(f"{url}/neighbors", content=photo, params={"k": 3, "vote": True}).json()
    for neighbor in actual["neighbors"]:
        assert f'"{neighbor["id"]}"' in neighbors
        assert f"{neighbor['score']:.4f}"[:-1] in neighbors
    assert f'"{actual["vote"]["label"]}"' in neighbors


def test_file_map() -> None:
    """Every module of the packages stands in the map, and the map names no file that is gone."""
    text = (ROOT / "README.md").read_text().split("## File map")[1]
    modules = {
        p.name for package in ("train", "export", "serve") for p in (ROOT / package).glob("patchsight_*/**/[a-z]*.py")
    }
    named = set(re.findall(r"\b[a-z_]+\.py\b", text))
    assert named == modules
