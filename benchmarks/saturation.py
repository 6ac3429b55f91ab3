"""What does an image cost, at saturation? All servers of serving.py at once, asked in turn, two seconds at a time.

    python benchmarks/saturation.py      # 7 minutes; needs two cores, and better nobody else on them

serving.py goes through its servers in rounds of minutes. On a processor that others use, which changes its speed from
one minute to the next, that compares minutes, not servers. Here a ratio is taken within its round of turns, and the
figure is CPU time: of the server's whole process tree, over the images that it answered. Everything else is as there:
photos, clients, cores, the ONNX file and what each server was told.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import photo_mix
from contenders import CONTENDERS, Terms
from measure import ROOT, publish, save
from pinned_server import stand_aside
from serving import BATCH, DISTINCT, FAILURES, QUEUE, Target, bare_embedding, started, usual
from serving_record import Saturated
from triton_process import free_port

CONNECTIONS = 8
REFERENCE = "fastapi"
LEFT_S = 0.6  # after a turn: a server computes on for clients that have gone


@contextmanager
def targets(names: list[str], bundle: Path, photos: list[bytes]) -> Iterator[dict[str, Target]]:
    """Every server that starts and embeds as the bare encoder does; of the others it is said why not."""
    wanted = bare_embedding(bundle, photos[0])
    found: dict[str, Target] = {}
    with ExitStack() as stack:
        for name in names:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="s", ignore_cleanup_errors=True)))
            terms = Terms(bundle, BATCH, QUEUE, free_port(), folder)
            try:
                found[name], _ = stack.enter_context(started(CONTENDERS[name], terms, photos, wanted))
            except FAILURES as error:
                if name == REFERENCE:
                    raise
                print(f"{name}: {' '.join(str(error).split())}", flush=True)
        yield found


def rotated(names: list[str], by: int) -> list[str]:
    """Another is the first, so that nobody always comes after the same one."""
    by %= len(names)
    return names[by:] + names[:by]


def figures_of(turns: dict[str, list[Saturated]]) -> dict[str, Any]:
    """Medians over the rounds. images_for_one: how many are computed in the CPU time of one of the reference's,
    quartiles of the ratio within each round."""
    found = {}
    for name, seen in turns.items():
        costs = np.array([turn.cpu_ms for turn in seen])
        ratio = np.array([turn.cpu_ms for turn in turns[REFERENCE]]) / costs
        found[name] = {
            "images_per_s": round(median(turn.rate for turn in seen), 1),
            "cpu_ms": [round(float(q), 1) for q in np.percentile(costs, [25, 50, 75])],
            "images_for_one": [round(float(q), 3) for q in np.percentile(ratio, [25, 50, 75])],
            "failed": sum(turn.failed for turn in seen),
        }
    return found


def table(servers: dict[str, Any]) -> str:
    lines = ["| | images/s | CPU ms per image | images per CPU second, × FastAPI |", "| --- | --- | --- | --- |"]
    for name, figures in servers.items():
        low, middle, high = figures["images_for_one"]
        first, cost, third = figures["cpu_ms"]
        lines.append(
            f"| {CONTENDERS[name].label} | {figures['images_per_s']} | {cost} ({first}–{third}) "
            f"| **{middle:.2f}** ({low:.2f}–{high:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", choices=list(CONTENDERS), default=usual())
    parser.add_argument("--encoder", default="simclr-vit-tiny-photos")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--dry", action="store_true", help="neither save nor publish")
    arguments = parser.parse_args()
    stand_aside()
    names = sorted({REFERENCE, *arguments.servers}, key=list(CONTENDERS).index)
    photos = photo_mix.distinct(DISTINCT)
    with targets(names, ROOT / "model_repository" / arguments.encoder, photos) as servers:
        turns: dict[str, list[Saturated]] = {name: [] for name in servers}
        for number in range(arguments.rounds + 1):
            for name in rotated(list(servers), number):
                seen = servers[name].saturate(CONNECTIONS, arguments.seconds)
                time.sleep(LEFT_S)
                if number:  # the first round warms up
                    turns[name].append(seen)
            costs = ", ".join(f"{name} {seen[-1].cpu_ms:.1f}" for name, seen in turns.items() if seen)
            print(f"round {number} of {arguments.rounds}, CPU ms: {costs}", flush=True)
    found = figures_of(turns)
    print(table(found))
    if not arguments.dry:
        told = {"encoder": arguments.encoder, "connections": CONNECTIONS, "batch": BATCH, "queue": QUEUE}
        told |= {"rounds": arguments.rounds, "turn_s": arguments.seconds}
        save("saturation", {**told, "servers": found, "load_average_at_the_end": round(os.getloadavg()[0], 1)})
        publish("saturation", table(found))


if __name__ == "__main__":
    main()
