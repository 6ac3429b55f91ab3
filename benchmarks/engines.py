"""What do the engines make of a processor? Images per second of every encoder that ships.

    python benchmarks/engines.py

ONNX Runtime in fp32, OpenVINO in fp32, and in bf16 where the processor has it. Every round runs each of them once, in
turn; a ratio is taken within its round, so that what else the machine does weighs on both. Wall clock: with all
threads an engine is as fast as its slowest one. Figures are medians, with quartiles of the ratio.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from measure import ROOT, publish, save

from patchsight_serve.encoder import Encoder
from patchsight_serve.openvino_encoder import OpenvinoEncoder, capabilities
from patchsight_serve.ort_encoder import OrtEncoder
from patchsight_serve.repository import bundles
from patchsight_serve.trial_pictures import noise

BATCHES = (1, 8, 32)
REFERENCE = "ONNX Runtime fp32"
ROUND_S = 0.1  # seconds that one engine takes in one round, at least


def engines(bundle: Path, threads: int) -> dict[str, Encoder]:
    found: dict[str, Encoder] = {
        REFERENCE: OrtEncoder(bundle, threads), "OpenVINO fp32": OpenvinoEncoder(bundle, threads),
    }  # fmt: skip
    if "BF16" in capabilities(openvino.Core()):
        found["OpenVINO bf16"] = OpenvinoEncoder(bundle, threads, "bf16")
    return found


def measure(found: dict[str, Encoder], batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """By engine: images per second, and times the reference, with quartiles over the rounds."""
    manifest = found[REFERENCE].manifest
    images, outputs = noise(manifest.transform.crop, batch), [f"{manifest.recommended}_embedding"]
    rates: dict[str, list[float]] = {name: [] for name in found}
    repeats = 0
    for encoder in found.values():
        encoder.run(images, outputs)
        start = time.perf_counter()
        encoder.run(images, outputs)
        repeats = max(repeats, round(ROUND_S / (time.perf_counter() - start)), 1)
    for _ in range(rounds):
        for name, encoder in found.items():
            start = time.perf_counter()
            for _ in range(repeats):
                encoder.run(images, outputs)
            rates[name].append(batch * repeats / (time.perf_counter() - start))
    figures = {}
    for name, values in rates.items():
        low, middle, high = np.percentile(np.array(values) / np.array(rates[REFERENCE]), (25, 50, 75))
        figures[name] = {
            "images_per_s": round(float(np.median(values)), 1),
            "ratio": round(float(middle), 3), "ratio_q25": round(float(low), 3), "ratio_q75": round(float(high), 3),
        }  # fmt: skip
    return figures


def table(rows: Sequence[dict[str, Any]]) -> str:
    others = [name for name in rows[0]["engines"] if name != REFERENCE]
    lines = [f"| encoder | threads | batch | {REFERENCE}, images/s | {' | '.join(others)} |"]
    lines.append("| --- " * (4 + len(others)) + "|")
    for row in rows:
        cells = [f"{row['engines'][REFERENCE]['images_per_s']:,.0f}"]
        for name in others:
            f = row["engines"][name]
            cells.append(f"**{f['ratio']:.2f} ×** ({f['ratio_q25']:.2f} to {f['ratio_q75']:.2f})")
        lines.append(f"| {row['encoder']} | {row['threads']} | {row['batch']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args(argv).rounds
    rows: list[dict[str, Any]] = []
    for bundle in bundles(ROOT / "model_repository"):
        for threads in dict.fromkeys((1, os.cpu_count() or 1)):
            found = engines(bundle, threads)
            for batch in BATCHES:
                measured = measure(found, batch, rounds)
                rows.append({"encoder": bundle.name, "threads": threads, "batch": batch, "engines": measured})
                print(table(rows[-1:]).splitlines()[-1])
                sys.stdout.flush()
    busy = f"load average {os.getloadavg()[0]:.1f} at the end, of which this is 1 to {os.cpu_count()}"
    save("engines", {"rounds": rounds, "other_load": busy, "openvino": openvino.__version__, "rows": rows})
    publish("engines", table(rows))


if __name__ == "__main__":
    main()
