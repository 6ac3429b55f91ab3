"""The map over HTTP: principal components at once, UMAP by a process of its own when it is ready, kept while true."""

import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from starlette.testclient import TestClient

from patchsight_serve import gallery_map, umaps
from patchsight_serve.gallery_map import sample
from patchsight_serve.item import Identity, Item, NewImage
from patchsight_serve.nearest import normalize
from patchsight_serve.umap_child import LEAST

ENCODER = Identity("vit", "a" * 64)
FAKE = """
import io, pathlib, sys, time
import numpy as np
data = sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(8), "little"))
vectors = np.load(io.BytesIO(data))
folder = pathlib.Path(sys.argv[1])
with (folder / "calls").open("a") as calls:
    calls.write(f"{len(vectors)}\\n")
while not (folder / "go").exists():
    time.sleep(0.01)
if (folder / "go").read_text():
    print("out of luck", file=sys.stderr)
    sys.exit(3)
np.save(sys.stdout.buffer, np.abs(vectors[:, 1:3]))
"""


def planted(count: int = 120, dim: int = 24, seed: int = 0, spread: float = 0.5) -> np.ndarray:
    """Unit vectors around eight centers, one after the other."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((8, dim))
    return normalize((centers[np.arange(count) % 8] + spread * rng.standard_normal((count, dim))).astype(np.float32))


def fill(client: TestClient, vectors: np.ndarray, name: str = "default", first: int = 0) -> None:
    images = [
        NewImage(Item(f"i{i:03d}", f"l{i % 8}" if i % 3 else None), str(i).encode(), b"", vector)
        for i, vector in enumerate(vectors, first)
    ]
    client.app.state.galleries.get(name, True).add(images, ENCODER)  # type: ignore[attr-defined]


def ask(client: TestClient, **query: Any) -> dict[str, Any]:
    reply = client.get("/gallery/map", params=query)
    assert reply.status_code == 200, reply.text
    told = reply.json()
    assert {len(told[column]) for column in ("ids", "labels", "xs", "ys")} == {told["shown"]}
    return told


def positions(reply: dict[str, Any]) -> dict[str, tuple[float, float]]:
    return dict(zip(reply["ids"], zip(reply["xs"], reply["ys"], strict=True), strict=True))


def state(client: TestClient, **query: Any) -> str:
    return str(ask(client, limit=0, **query)["umap"]["state"])


class FakeUmap:
    """A process in UMAP's place: it notes that it was called, and waits until it is let go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def calls(self) -> list[int]:
        """For each call the number of vectors."""
        file = self._folder / "calls"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def go(self, outcome: str = "") -> None:
        """Let it go, to its death where `outcome` is anything."""
        (self._folder / "go").write_text(outcome)

    def hold(self) -> None:
        (self._folder / "go").unlink()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeUmap:
    monkeypatch.setattr(umaps, "COMMAND", [sys.executable, "-c", FAKE, str(tmp_path)])
    return FakeUmap(tmp_path)


def test_principal_components_come_at_once(client: TestClient, fake: FakeUmap) -> None:
    vectors = planted()
    fill(client, vectors)
    reply = ask(client)
    assert (reply["method"], reply["images"], reply["shown"]) == ("pca", 120, 120)
    assert reply["encoder"] == {"name": "vit", "sha256": "a" * 64}
    assert reply["umap"] == {"state": "working", "error": None}
    rows = [int(id[1:]) for id in reply["ids"]]
    assert sorted(rows) == list(range(120))
    assert reply["labels"] == [f"l{i % 8}" if i % 3 else None for i in rows]
    plane = PCA(2, svd_solver="full").fit_transform(vectors)[rows]
    middle, span = (plane.max(0) + plane.min(0)) / 2, np.ptp(plane, axis=0).max()
    expected = (plane - middle) / span + 0.5
    assert np.abs(np.array([reply["xs"], reply["ys"]]).T - expected).max() < 2e-5
    fake.go()


def test_pca_alone_begins_no_umap_and_limit_cuts(client: TestClient, fake: FakeUmap) -> None:
    fill(client, planted())
    whole = ask(client, method="pca")
    assert whole["umap"]["state"] == "none"
    few = ask(client, method="pca", limit=7)
    assert (few["images"], few["shown"]) == (120, 7)
    assert positions(few) == {id: positions(whole)[id] for id in whole["ids"][:7]}
    assert ask(client, method="pca", limit=0)["ids"] == []
    assert fake.calls() == []
    assert client.get("/gallery/map", params={"limit": 20_001}).json()["error"]["param"] == "limit"
    assert client.get("/gallery/map", params={"method": "tsne"}).json()["error"]["param"] == "method"
    assert client.get("/gallery/map", params={"gallery": "nowhere"}).status_code == 404


def test_umap_is_kept_until_the_gallery_changes(
    client: TestClient, fake: FakeUmap, until: Callable[[Callable[[], object]], None]
) -> None:
    vectors = planted(130)
    fill(client, vectors[:120])
    assert (state(client), state(client)) == ("working", "working")
    fake.go()
    until(lambda: state(client) == "ready")
    reply = ask(client)
    assert reply["method"] == "umap"
    expected = {f"i{i:03d}": tuple(np.abs(v[1:3]).tolist()) for i, v in enumerate(vectors[:120])}
    assert positions(reply) == {id: pytest.approx(place) for id, place in expected.items()}
    assert ask(client, method="pca")["method"] == "pca"
    client.patch("/gallery/images/i004", json={"label": "new"}).raise_for_status()
    assert dict(zip(ask(client)["ids"], ask(client)["labels"], strict=True))["i004"] == "new"
    assert fake.calls() == [120]

    fake.hold()
    fill(client, vectors[120:], first=120)
    client.delete("/gallery/images/i003").raise_for_status()
    assert ask(client, method="pca")["umap"]["state"] == "stale"
    stale = ask(client)
    assert (stale["method"], stale["umap"]["state"]) == ("umap", "stale")
    assert (stale["images"], stale["shown"]) == (129, 119)  # as it was, without what is gone
    fake.go()
    until(lambda: state(client) == "ready")
    assert ask(client)["shown"] == 129
    assert fake.calls() == [120, 129]


def test_one_gallery_at_a_time(
    client: TestClient, fake: FakeUmap, until: Callable[[Callable[[], object]], None]
) -> None:
    fill(client, planted())
    fill(client, planted(60), "other")
    assert state(client) == "working"
    assert (state(client, gallery="other"), state(client)) == ("waiting", "working")
    fake.go()
    until(lambda: state(client, gallery="other") == "ready" and state(client) == "ready")
    assert fake.calls() == [120, 60]


def test_another_gallery_in_its_place_has_another_map(
    client: TestClient, fake: FakeUmap, until: Callable[[Callable[[], object]], None]
) -> None:
    fill(client, planted())
    fake.go()
    until(lambda: state(client) == "ready")
    backup = client.get("/gallery/backup").content
    client.post("/gallery/restore", params={"replace": True}, content=backup).raise_for_status()
    assert ask(client)["method"] == "pca"


@pytest.mark.parametrize("death", ["killed", "status"])
def test_a_process_that_dies_is_told_and_tried_again(
    death: str,
    client: TestClient,
    fake: FakeUmap,
    until: Callable[[Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fill(client, planted())
    assert state(client) == "working"
    until(lambda: fake.calls() == [120])
    if death == "killed":
        client.app.state.maps.umaps._process.kill()  # type: ignore[attr-defined]
    else:
        fake.go("die")
    until(lambda: state(client) == "failed")
    reply = ask(client)
    assert (reply["method"], reply["shown"]) == ("pca", 120)
    assert f"status {-9 if death == 'killed' else 3}" in reply["umap"]["error"]
    assert ("out of luck" in caplog.text) == (death == "status")
    assert fake.calls() == [120]
    monkeypatch.setattr(umaps, "RETRY_S", 0)
    fake.go()
    assert ask(client, method="pca")["umap"]["state"] == "failed"
    until(lambda: state(client) == "ready")


def test_a_server_that_leaves_ends_the_process(serving: Callable[..., TestClient], fake: FakeUmap) -> None:
    client = serving()
    fill(client, planted())
    assert state(client) == "working"
    client.app.state.maps.close()  # type: ignore[attr-defined]
    process = client.app.state.maps.umaps._process  # type: ignore[attr-defined]
    assert process is None or process.returncode == -9
    fake.go()


def test_a_server_that_was_killed_takes_the_process_along(
    tmp_path: Path, until: Callable[[Callable[[], object]], None]
) -> None:
    """The real one, which only begins to load UMAP here."""
    start = """
import subprocess, sys, time
import numpy as np
from patchsight_serve.umaps import COMMAND, _send
child = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
_send(child.stdin, np.eye(30, dtype=np.float32))
print(child.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, cwd=tmp_path) as server:
        assert server.stdout
        child = Path(f"/proc/{int(server.stdout.readline())}")
        assert child.exists()
        server.kill()
    until(lambda: not child.exists() or "\nState:\tZ" in (child / "status").read_text())


def test_without_the_extra_it_says_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(umaps, "find_spec", lambda name: None if name == "umap" else find_spec(name))
    fill(client, planted())
    reply = ask(client)
    assert (reply["method"], reply["shown"], reply["umap"]["state"]) == ("pca", 120, "not_installed")


def test_too_few_and_none(client: TestClient) -> None:
    assert ask(client) == {
        "encoder": None, "method": "pca", "umap": {"state": "too_few", "error": None}, "images": 0, "shown": 0,
        "ids": [], "labels": [], "xs": [], "ys": [],
    }  # fmt: skip
    fill(client, planted(LEAST - 1))
    reply = ask(client)
    assert (reply["shown"], reply["umap"]["state"]) == (LEAST - 1, "too_few")


def test_of_many_images_a_sample_that_hardly_changes(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).permutation(100_000)[:50_000]
    chosen = set(keys[sample(keys)].tolist())
    assert len(chosen) == 20_000
    assert set(keys[:-1][sample(keys[:-1])].tolist()) ^ chosen <= set(keys.tolist())
    assert len(set(keys[:-1][sample(keys[:-1])].tolist()) ^ chosen) in (0, 2)
    assert np.abs(np.corrcoef(keys[sample(keys)][:-1], keys[sample(keys)][1:])[0, 1]) < 0.03
    assert abs(np.mean(list(chosen)) - 50_000) < 1000

    monkeypatch.setattr(gallery_map.place, "__defaults__", (50,))
    fill(client, planted())
    reply = ask(client, method="pca")
    assert (reply["images"], reply["shown"]) == (120, 50)
    assert reply == ask(client, method="pca")


def test_umap_is_never_loaded_here() -> None:
    check = """
import sys
import patchsight_serve.app
assert not {"umap", "numba", "sklearn", "scipy", "pynndescent"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_real_umap(client: TestClient) -> None:
    """It keeps neighbors together, better than principal components do."""
    vectors = planted(dim=64, spread=0.6)
    fill(client, vectors)
    while state(client) == "working":  # the test's own time limit ends it
        time.sleep(0.5)
    by_umap, by_pca = ask(client), ask(client, method="pca")
    assert by_umap["method"] == "umap", by_umap["umap"]
    assert min(by_umap["xs"] + by_umap["ys"]) >= 0
    assert max(np.ptp(by_umap["xs"]), np.ptp(by_umap["ys"])) == 1
    trust = {
        reply["method"]: trustworthiness(
            vectors, [positions(reply)[f"i{i:03d}"] for i in range(120)], n_neighbors=10, metric="cosine"
        )
        for reply in (by_umap, by_pca)
    }
    assert trust["umap"] > 0.97 > trust["pca"]


@pytest.mark.acceptance
def test_umap_depends_on_the_set_of_vectors_alone(tmp_path: Path) -> None:
    """And every vector has a place, also one at right angles to all others, and one that is there many times."""
    check = """
import numpy as np
from patchsight_serve.umap_child import umap
vectors = np.load("vectors.npy")
order = np.random.default_rng(1).permutation(len(vectors))
plane = umap(vectors)
again = umap(vectors[order])
assert np.isfinite(plane).all()
assert sorted(plane.tolist()) == sorted(again.tolist())
assert np.array_equal(plane[-120:], again[np.argsort(order)][-120:])  # equal vectors may change places
"""
    vectors = np.concatenate([np.eye(40), np.tile(np.eye(1, 40), (30, 1)), planted(dim=40)]).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    subprocess.run([sys.executable, "-c", check], cwd=tmp_path, check=True)
