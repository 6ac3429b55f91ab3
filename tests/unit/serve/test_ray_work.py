"""Bulk embedding by Ray Data, against the single process: the same file, also when a worker is killed."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from patchsight_serve import embed, ray_work
from patchsight_serve.dataset import read_dataset
from patchsight_serve.embedding_file import read_embeddings
from patchsight_serve.errors import PatchsightError
from patchsight_serve.sample_gallery import SAMPLES
from patchsight_serve.sources import read_sources

ROOT = Path(__file__).resolve().parents[3]
IMAGES = 2000
WORKER = b"ray::MapWorker(MapBatches(Worker)"


def test_a_dataset_can_go_to_another_process(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    (tmp_path / "a.png").write_bytes(encode(np.zeros((4, 4, 3), np.uint8)))
    here = read_sources([str(SAMPLES), str(tmp_path)])
    here.read(3)  # with pages that were read already
    there = pickle.loads(pickle.dumps(here))
    assert (there.names, there.class_names, there.nbytes) == (here.names, here.class_names, here.nbytes)
    for i in (0, 3, 199, 200):
        assert there.read(i) == here.read(i)


def test_without_ray_it_says_what_to_install(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as exit:
        embed.main(
            [str(SAMPLES), "--out", str(tmp_path / "e.parquet"), "--ray", "--model-repository", str(tiny_bundle.parent)]
        )
    assert exit.value.code == 1
    assert "pip install 'patchsight[ray]'" in capsys.readouterr().err


def test_a_gallery_is_not_rays(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        embed.main([str(SAMPLES), "--gallery", "mine", "--ray"])
    assert exit.value.code == 2
    assert "--ray is for --out" in capsys.readouterr().err


class Slow:
    """Ray on a machine that is too busy for it, `times` times."""

    def __init__(self, times: int) -> None:
        self.times, self.asked, self.data = times, [], SimpleNamespace(DataContext=SimpleNamespace(get_current=dict))

    def init(self, address: str | None = None, **_: object) -> None:
        self.asked.append(address)
        if len(self.asked) <= self.times:
            raise Exception("The current node timed out during startup.")

    def shutdown(self) -> None:
        pass


def test_ray_that_does_not_start_is_asked_again_and_then_said(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(times=3)
    with pytest.raises(PatchsightError, match="Ray did not start: The current node timed out"):
        ray_work._start(slow)
    assert slow.asked == ["local"] * 3
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    slow = Slow(times=2)
    slow.data.DataContext.get_current = lambda: slow  # which keeps what it is told
    ray_work._start(slow)
    assert slow.asked == [None] * 3
    assert slow.enable_progress_bars is False


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 photos in class folders; 1 % are cut or no images."""
    folder, samples = tmp_path_factory.mktemp("ray") / "photos", read_dataset(SAMPLES)
    assert samples.labels is not None
    assert samples.class_names is not None
    for i in range(IMAGES):
        row = i % len(samples)
        path = folder / samples.class_names[samples.labels[row]] / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = samples.read(row)
        path.write_bytes(data if i % 100 != 50 else data[:2000] if i % 200 == 50 else b"a text")
    return folder


def started(photos: Path, out: Path, *arguments: str) -> subprocess.Popen[bytes]:
    line = [str(photos), "--out", str(out), "--model-repository", str(ROOT / "model_repository")]
    return subprocess.Popen(
        [sys.executable, "-m", "patchsight_serve.embed", *line, "--encoder", "simclr-vit-cifar10", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def written(process: subprocess.Popen[bytes], out: Path) -> tuple[bytes, list[str]]:
    printed, error = process.communicate()
    assert process.returncode == 0, error.decode()
    assert b"1,980 embeddings" in printed
    return out.read_bytes(), sorted(Path(f"{out}.skipped.jsonl").read_text().splitlines())


def workers_of(pid: int) -> list[int]:
    """Ray's processes with an encoder that descend from a process."""
    parents, workers = {}, []
    for folder in Path("/proc").iterdir():
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (folder / "cmdline").read_bytes().startswith(WORKER):
                workers.append(int(folder.name))
        except (OSError, ValueError):
            continue

    def descends(one: int) -> bool:
        while one in parents and one != pid:
            one = parents[one]
        return one == pid

    return [worker for worker in workers if descends(worker)]


@pytest.fixture(scope="module")
def expected(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[str]]:
    """What the single process writes."""
    alone = tmp_path_factory.mktemp("alone") / "e.parquet"
    found = written(started(photos, alone), alone)
    assert len(read_embeddings(alone)) == len(set(read_embeddings(alone).names)) == IMAGES * 99 // 100
    assert len(found[1]) == IMAGES // 100
    return found


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_ray_and_one_process_write_the_same_file(
    photos: Path, expected: tuple[bytes, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "ray.parquet"
    assert written(started(photos, out, "--ray"), out) == expected


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_so_they_do_when_a_worker_is_killed_midway(
    photos: Path, expected: tuple[bytes, list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "killed.parquet"
    process = started(photos, out, "--ray")
    while not Path(f"{out}.skipped.jsonl").exists():  # the first part is done, others are in work
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.05)
    killed = workers_of(process.pid)[0]
    os.kill(killed, signal.SIGKILL)
    assert not out.exists()
    assert written(process, out) == expected
    assert killed not in workers_of(process.pid)
