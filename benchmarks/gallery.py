"""The gallery's search beside its peers: bare FAISS, usearch, milvus-lite, and pgvector in a real PostgreSQL.

    python benchmarks/gallery.py --count 100000     # all contenders: an hour on 2 cores
    python benchmarks/gallery.py --count 1000000 --arms patchsight patchsight_exact faiss_lists faiss_codes faiss_flat
    python benchmarks/gallery.py --count 20000 --seconds 3 --dry   # a trial: minutes

The second takes half an hour, 12 GB of disk and 6 GB of memory; with the graphs of the others, hours.

Vectors of 384 numbers, half made up and half real embeddings repeated with noise, queries of both kinds with the truth
by brute force (gallery_vectors.py). First each contender is filled in batches of 1,000, then each is asked, in a new
process (gallery_arm.py): cold start, memory, the least effort that finds 0.99 of the 10 nearest, latency with 1 and 16
clients while 100 vectors a second come in, filters. One thread per query. What is done is kept in
`runs/gallery/<count>`, so that a run that was stopped goes on. Writes `benchmarks/results/gallery-<count>.json`, the
tables in docs/search.md and their plot, where that page has a place for this count.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gallery_report
from gallery_arm import ARMS
from gallery_peers.contender import DIM
from gallery_vectors import prepare
from measure import ROOT, publish, save
from peer_environment import python_of

PLOT = "![recall at 10 against milliseconds, a line for each contender](images/{}.png)"


def kept(name: str, verb: str, folder: Path) -> Path:
    """What an arm said after it was filled or asked."""
    return folder / f"{name}.{verb}.json"


def run(name: str, verb: str, folder: Path, seconds: float) -> dict[str, Any]:
    """What the arm says, or said in an earlier run; `failure` where it cannot, with its last words. Its log is
    `<name>.<verb>.log`."""
    arm, answer, log = ARMS[name], kept(name, verb, folder), folder / f"{name}.{verb}.log"
    if answer.exists():
        return dict(json.loads(answer.read_text()))
    try:
        python = python_of(arm.environment) if arm.environment else Path(sys.executable)
    except RuntimeError as error:
        return {"failure": str(error)}
    with store(name, verb, folder) as place, log.open("w") as errors:
        line = [str(python), str(Path(__file__).with_name("gallery_arm.py")), name, verb]
        line += [str(place), str(folder), str(seconds)]
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=errors, text=True)
    if done.returncode:
        words = log.read_text().strip().splitlines() or [f"it ended with status {done.returncode}"]
        return {"failure": f"{verb}: {words[-1]}"}
    said = done.stdout.strip().splitlines()[-1]  # some contenders print too
    answer.write_text(said + "\n")
    return dict(json.loads(said))


@contextmanager
def store(name: str, verb: str, folder: Path) -> Iterator[Path]:
    """The folder to fill; or, as whoever is asked is written to as well, a copy of what was filled in."""
    filled = folder / (ARMS[name].filled or name)
    if verb == "fill":
        shutil.rmtree(filled, ignore_errors=True)  # half of it, of a run that was stopped
        yield filled
        return
    copy = folder / f"{name}.asked"
    shutil.rmtree(copy, ignore_errors=True)
    try:
        subprocess.run(
            ["cp", "-a", str(filled), str(copy)], check=True
        )  # with owners: PostgreSQL has a user of its own
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def measure(names: list[str], folder: Path, seconds: float, keep: bool) -> dict[str, dict[str, Any]]:
    """Fill all, then ask all: those that are compared are asked soon after one another."""
    filled, asked = {}, {}
    for name in names:
        source = ARMS[name].filled or name
        if not (folder / source).exists() and not kept(name, "ask", folder).exists():
            kept(source, "fill", folder).unlink(missing_ok=True)  # it is gone, and somebody has still to be asked
        filled[source] = run(source, "fill", folder, seconds)
        print(source, filled[source], flush=True)
    for name in names:
        fill = filled[ARMS[name].filled or name]
        asked[name] = fill if "failure" in fill else run(name, "ask", folder, seconds)
        print(name, asked[name], flush=True)
    for name in () if keep else filled:
        shutil.rmtree(folder / name, ignore_errors=True)
    return {name: {"label": ARMS[name].label, "fill": filled.get(name), "ask": asked[name]} for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="vectors")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "gallery", help="for vectors, stores, and what was said"
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--keep", action="store_true", help="the filled stores, to ask them again")
    parser.add_argument("--dry", action="store_true", help="neither save nor publish")
    given = parser.parse_args()
    folder = prepare(given.folder.resolve(), given.count)
    arms = measure(given.arms, folder, given.seconds, given.keep)
    figures = {"count": given.count, "dim": DIM, "arms": arms}
    print(gallery_report.tables(figures))
    if not given.dry:
        name = f"gallery-{given.count}"
        save(name, figures)
        publish(name, f"{gallery_report.tables(figures)}\n\n{PLOT.format(name)}")
        gallery_report.draw(figures, ROOT / "docs" / "images" / f"{name}.png")


if __name__ == "__main__":
    main()
