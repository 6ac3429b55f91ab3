"""Half an hour at 80 % of what the server gives: no request fails, and memory stays what it was."""

import os
import sys
import time
from pathlib import Path

import load_generator
import numpy as np
import photo_mix
import process_tree
import pytest
from load_generator import closed_loop, http_request, open_loop, poisson
from measure import ROOT
from pinned_server import running
from triton_process import free_port

MINUTES = float(os.environ.get("PATCHSIGHT_SOAK_MINUTES", "30"))
PIECE_S = 30.0

pytestmark = [pytest.mark.acceptance, pytest.mark.data, pytest.mark.timeout(MINUTES * 60 + 300)]


def test_half_an_hour_at_80_percent_load(tmp_path: Path) -> None:
    port = free_port()
    command = [
        sys.executable, "-m", "patchsight_serve", "--port", str(port), "--threads", "1", "--no-sample-gallery",
        "--model-repository", str(ROOT / "model_repository"), "--state-dir", str(tmp_path / "state"),
        "--log-level", "warning",
    ]  # fmt: skip
    url, headers = f"http://127.0.0.1:{port}", {"Content-Type": "image/jpeg", "Accept": "application/octet-stream"}
    requests = [http_request("/embed", headers, photo) for photo in photo_mix.distinct(400)]
    log = tmp_path / "log"
    with running(command, os.environ, url, requests[0], log) as (pid, _):
        load_generator.run(closed_loop(url, requests, 16, 5.0))  # warms up
        answered = load_generator.run(closed_loop(url, requests, 16, 15.0))
        rate = 0.8 * sum(reply.status == 200 for reply in answered) / 15.0
        statuses: dict[int, int] = {}
        minutes, megabytes = [], []
        began = time.monotonic()
        while (passed := (time.monotonic() - began) / 60) < MINUTES:
            due = poisson(rate, PIECE_S, seed=len(minutes))
            for reply in load_generator.run(open_loop(url, requests, due)):
                statuses[reply.status] = statuses.get(reply.status, 0) + 1
            minutes.append(passed)
            megabytes.append(process_tree.memory_mb(pid))
            print(f"{passed:.1f} min: {statuses}, {megabytes[-1]:.0f} MB", flush=True)
    half = len(minutes) // 2
    slope, _ = np.polyfit(minutes[half:], megabytes[half:], 1)
    print(f"{rate:.1f} requests/s for {MINUTES:g} min: {statuses}; {slope:+.3f} MB a minute at {megabytes[-1]:.0f} MB")
    assert list(statuses) == [200]
    assert abs(slope) * MINUTES < 0.05 * megabytes[-1]
    assert log.read_text() == ""
