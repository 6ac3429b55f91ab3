"""Write deploy/grafana/dashboard.json: the panels below, three in a row.

python deploy/grafana/write_dashboard.py        (or: make dashboard)
"""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "dashboard.json"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
WINDOW = "$__rate_interval"
WIDTH, HEIGHT = 8, 7
ANSWERS = 'route=~"/embed|/attention|/neighbors.*|/gallery/images|/v1/embeddings"'


def share(q: float, metric: str, by: str = "", where: str = "") -> str:
    """The quantile of a histogram; with a filter on its labels, and one curve for each value of `by`."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate(patchsight_{metric}_bucket{{{where}}}[{WINDOW}])))"


def rate(metric: str, by: str, where: str = "") -> str:
    """Of a counter, per second."""
    return f"sum by ({by}) (rate(patchsight_{metric}_total{{{where}}}[{WINDOW}]))"


# Title, unit, and by legend the queries.
PANELS: list[tuple[str, str, dict[str, str]]] = [
    ("Images per second", "short", {"{{encoder}}": rate("images", "encoder"),
                                    "shared by {{encoder}}": rate("shared_images", "encoder")}),
    ("Requests per second, by status", "reqps", {"{{code}}": rate("requests", "code")}),
    ("Requests per second, by route", "reqps", {"{{route}}": rate("requests", "route")}),
    ("Time to answer", "s", {f"p{round(100 * q)}": share(q, "request_duration_seconds", where=ANSWERS)
                             for q in (0.5, 0.95, 0.99)}),
    ("Time to answer, p95 by route", "s", {"{{route}}": share(0.95, "request_duration_seconds", "route", ANSWERS)}),
    ("Stages of a request, p95", "s", {stage: share(0.95, f"{stage}_seconds")
                                       for stage in ("decode", "queue", "infer", "encode")}),
    ("Images in a batch", "short", {"p50": share(0.5, "batch_size", "encoder"),
                                    "mean": f"sum(rate(patchsight_batch_size_sum[{WINDOW}])) / "
                                            f"sum(rate(patchsight_batch_size_count[{WINDOW}]))"}),
    ("Images in work or waiting", "short", {"{{encoder}}": "sum by (encoder) (patchsight_admitted_images)"}),
    ("Open connections", "short", {"connections": "sum(patchsight_connections)"}),
    ("Images not encoded per second, by reason", "short", {"{{reason}}": rate("rejected_images", "reason")}),
    ("Requests refused per second, by reason", "reqps", {"{{reason}}": rate("rejected_requests", "reason")}),
    ("Ready", "short", {"{{instance}} answers": 'up{job="patchsight"}',
                        "{{code}} from /readyz": rate("requests", "code", 'route="/readyz"')}),
    ("Memory", "bytes", {"resident": "process_resident_memory_bytes{job=\"patchsight\"}"}),
    ("CPU, cores", "short", {"cores": f'rate(process_cpu_seconds_total{{job="patchsight"}}[{WINDOW}])'}),
    ("Galleries", "short", {"images": "sum(patchsight_gallery_images)", "open": "sum(patchsight_open_galleries)"}),
    ("Space left for galleries", "bytes", {"free": "min(patchsight_free_bytes)"}),
    ("Triton: images per second", "short", {"{{model}}": f"sum by (model) (rate(nv_inference_count[{WINDOW}]))"}),
    ("Triton: time of a call, and in its queue", "s", {
        "{{model}}": f"sum by (model) (rate(nv_inference_request_duration_us[{WINDOW}])) / "
                     f"sum by (model) (rate(nv_inference_request_success[{WINDOW}])) / 1e6",
        "{{model}} queue": f"sum by (model) (rate(nv_inference_queue_duration_us[{WINDOW}])) / "
                           f"sum by (model) (rate(nv_inference_request_success[{WINDOW}])) / 1e6"}),
]  # fmt: skip


def dashboard() -> dict[str, Any]:
    """What Grafana reads."""
    panels = [
        {
            "id": i + 1,
            "type": "timeseries",
            "title": title,
            "datasource": SOURCE,
            "gridPos": {"x": WIDTH * (i % 3), "y": HEIGHT * (i // 3), "w": WIDTH, "h": HEIGHT},
            "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8}}, "overrides": []},
            "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
            "targets": [
                {"refId": chr(65 + n), "datasource": SOURCE, "expr": query, "legendFormat": legend}
                for n, (legend, query) in enumerate(queries.items())
            ],
        }
        for i, (title, unit, queries) in enumerate(PANELS)
    ]
    return {
        "uid": "patchsight", "title": "patchsight", "schemaVersion": 39, "version": 1, "editable": True,
        "refresh": "10s", "time": {"from": "now-1h", "to": "now"}, "tags": ["patchsight"], "panels": panels,
    }  # fmt: skip


def text() -> str:
    """Of the file."""
    return json.dumps(dashboard(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
    print(FILE)
