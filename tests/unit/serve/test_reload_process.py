"""A real process whose encoders are changed under load, by SIGHUP."""

import concurrent.futures
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from patchsight_serve.decode import decode
from patchsight_serve.manifest import load_manifest, sha256_of
from patchsight_serve.ort_encoder import OrtEncoder

IMAGE = {"Content-Type": "image/png"}
VERSIONS = 3


@pytest.fixture
def versions(make_bundle: Callable[..., Path], tmp_path: Path) -> dict[str, list[Path]]:
    """By name, the same encoder with other weights."""
    rng, found = np.random.default_rng(0), {}
    for name in ("a", "b"):
        found[name] = [make_bundle(tmp_path / f"version-{i}" / name) for i in range(VERSIONS)]
        for bundle in found[name]:
            path = bundle / "1" / "model.onnx"
            model = onnx.load(path)
            (weight,) = (w for w in model.graph.initializer if w.name == "cls")
            weight.CopyFrom(numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32), "cls"))
            path.write_bytes(model.SerializeToString())
            told = re.sub(r'"sha256":"\w+"', f'"sha256":"{sha256_of(path)}"', (bundle / "encoder.json").read_text())
            (bundle / "encoder.json").write_text(told)
    return found


@pytest.fixture
def serve(tmp_path: Path, until: Callable[..., None]) -> Iterator[Callable[..., tuple["subprocess.Popen[bytes]", str]]]:
    processes: list[subprocess.Popen[bytes]] = []
    log = tmp_path / "log"

    def serve(*flags: str, **options: Any) -> tuple["subprocess.Popen[bytes]", str]:
        command = [sys.executable, "-m", "patchsight_serve", "--port", "0", "--threads", "1", "--no-sample-gallery"]
        command += ["--model-repository", str(tmp_path / "repository"), "--state-dir", str(tmp_path / "state"), *flags]
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, stdout=file, stderr=file, **options))
        until(lambda: processes[-1].poll() is not None or "running on" in log.read_text())
        found = re.search(r"running on (http://\S+)", log.read_text())
        assert found, log.read_text()
        return processes[-1], found[1]

    yield serve
    for process in processes:
        process.kill()
        process.wait(10)


def put(bundle: Path, repository: Path) -> None:
    """In the place of what was there."""
    shutil.copytree(bundle, repository / f".{bundle.name}")
    shutil.rmtree(repository / bundle.name, ignore_errors=True)
    (repository / f".{bundle.name}").rename(repository / bundle.name)


def resident(process: "subprocess.Popen[bytes]") -> int:
    """MB."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1_000_000


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("reloads", [5, pytest.param(50, marks=pytest.mark.acceptance)])
def test_two_encoders_reloaded_under_load(
    serve: Callable[..., Any],
    versions: dict[str, list[Path]],
    tmp_path: Path,
    png: bytes,
    reloads: int,
    engine: str,
    until: Callable[..., None],
) -> None:
    """Four clients without a pause: no request fails, no reply mixes versions, and memory comes back."""
    expected = {}
    for bundle in (b for bundles in versions.values() for b in bundles):
        encoder = OrtEncoder(bundle, threads=1)
        pixels = decode(png, encoder.manifest.transform)[None]
        expected[encoder.manifest.sha256] = encoder.run(pixels, ["cls_embedding"])["cls_embedding"][0]
    for bundles in versions.values():
        put(bundles[0], tmp_path / "repository")
    process, url = serve("--engine", engine)
    stop, seen = threading.Event(), set()

    def client(number: int) -> int:
        answered = 0
        with httpx.Client(base_url=url, timeout=60) as http:
            while not stop.is_set():
                name = "ab"[(number + answered) % 2]
                files = [("images", png), ("images", png)]
                reply = http.post("/embed", files=files, params={"encoder": name, "normalize": False})
                assert reply.status_code == 200, reply.text
                sha256 = reply.json()["encoder"]["sha256"]
                seen.add(sha256)
                for result in reply.json()["results"]:
                    np.testing.assert_allclose(result["embedding"], expected[sha256], rtol=1e-3, atol=1e-4)
                answered += 1
        return answered

    memory: list[int] = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        try:
            for i in range(1, reloads + 1):
                wanted = {name: bundles[i % VERSIONS] for name, bundles in versions.items()}
                for bundle in wanted.values():
                    put(bundle, tmp_path / "repository")
                process.send_signal(signal.SIGHUP)
                until(lambda: (tmp_path / "log").read_text().count("given back") == i)  # noqa: B023
                listed = httpx.get(f"{url}/encoders", timeout=60).json()
                assert {e["name"]: e["sha256"] for e in listed["encoders"]} == {
                    name: load_manifest(bundle).sha256 for name, bundle in wanted.items()
                }
                assert {e["runtime"]["engine"] for e in listed["encoders"]} == {engine}
                assert not any(c.done() for c in clients), "a client failed"
                memory.append(resident(process))
        finally:
            stop.set()
        assert all(c.result(60) > reloads for c in clients)
    assert seen == expected.keys()
    print(f"{engine}: MB after each reload: {memory}")
    assert np.mean(memory[-3:]) <= 1.05 * np.mean(memory[: max(3, reloads // 10)])
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_added_removed_and_damaged_by_hangup(
    serve: Callable[..., Any], versions: dict[str, list[Path]], tmp_path: Path, png: bytes, until: Callable[..., None]
) -> None:
    repository, log = tmp_path / "repository", tmp_path / "log"
    put(versions["a"][0], repository)
    process, url = serve("--engine", "onnxruntime")

    def listed() -> Any:
        return httpx.get(f"{url}/encoders", timeout=60).json()

    put(versions["b"][0], repository)
    put(versions["a"][1], repository)
    with (repository / "a" / "1" / "model.onnx").open("ab") as file:
        file.write(b"x")
    process.send_signal(signal.SIGHUP)
    until(lambda: "reloaded: added b" in log.read_text())
    assert [e["sha256"] for e in listed()["encoders"]] == [
        load_manifest(versions[name][0]).sha256 for name in ("a", "b")
    ]
    assert "the file was changed" in listed()["failed"]["a"]
    shutil.rmtree(repository / "a")
    process.send_signal(signal.SIGHUP)
    until(lambda: "removed a" in log.read_text())
    assert [e["name"] for e in listed()["encoders"]] == ["b"]
    shutil.rmtree(repository / "b")
    process.send_signal(signal.SIGHUP)
    until(lambda: "nothing was reloaded: --model-repository" in log.read_text())
    assert httpx.post(f"{url}/embed", content=png, headers=IMAGE).status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_hangup_of_the_terminal_ends_the_process(
    serve: Callable[..., Any], versions: dict[str, list[Path]], tmp_path: Path, until: Callable[..., None]
) -> None:
    put(versions["a"][0], tmp_path / "repository")
    master, terminal = pty.openpty()
    process, _ = serve("--engine", "onnxruntime", "--drain-delay-s", "0", stdin=terminal)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    until(lambda: "reloaded: added none" in (tmp_path / "log").read_text())
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
