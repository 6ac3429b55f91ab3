"""What every benchmark shares: where the data is, and how a result is written down. Measures nothing by itself."""

import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("PATCHSIGHT_TEST_DATA", ROOT.parent / "shared" / "data"))
# What a processor has, by its flag: the best first.
INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512_vnni": "AVX512-VNNI", "avx2": "AVX2"}
PACKAGES = ("numpy", "pillow", "onnxruntime-gpu", "onnxruntime", "faiss-cpu", "torch")


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json`: the figures with commit, hardware and versions."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    record = figures | {"commit": commit(), "hardware": hardware(), "versions": versions()}
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return path


def publish(name: str, markdown: str) -> None:
    """Put a table between `<!-- name -->` and `<!-- /name -->`, in the README and every page of docs/ with both."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        if begin in text and end in text:
            before, after = text.split(begin)[0], text.split(end, 1)[1]
            page.write_text(f"{before}{begin}\n{markdown.strip()}\n{end}{after}")


def commit() -> str:
    """Short hash of the tree, `+changes` if it differs."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "train", "export", "serve", "benchmarks/*.py")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")


def hardware() -> str:
    """Processor, cores, and the best of `INSTRUCTIONS` it has, for example `AMD EPYC, 2 cores, AVX512-VNNI`. Processors
    of one name, in virtual machines, differ in that."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = told.get("flags", "").split()
    best = [name for flag, name in INSTRUCTIONS.items() if flag in flags][:1]
    return ", ".join([told.get("model name", platform.machine()), f"{os.cpu_count()} cores", *best])


def versions() -> dict[str, str]:
    """Of Python and of the packages that determine speed or numbers, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found


@contextmanager
def paused(pid: int | None) -> Iterator[None]:
    """Another process stands still meanwhile."""
    if pid is None:
        yield
        return
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(1.0)  # what it has given to the GPU is finished
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
