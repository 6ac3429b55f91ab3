"""The tables and the plot of `serving.py`, out of its figures alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#000000")  # told apart by all


def tables(figures: Mapping[str, Any]) -> str:
    """Markdown: saturation and latency, then overload, then who is missing and why."""
    servers = figures["servers"].values()
    well = [server for server in servers if not server.get("failure")]
    ill = [
        f"{server['label']} is not in the tables: {server['failure']}" for server in servers if server.get("failure")
    ]
    parts = ["\n".join(_normal(well, figures["bound_cpu_ms"])), "\n".join(_overload(well)), *ill]
    return "\n\n".join(parts)


def _normal(servers: list[dict[str, Any]], bound: float) -> list[str]:
    lines = [
        "| | images/s | CPU ms per image | bound / CPU | p50 / p95 / p99 ms at 50 % of its own saturation | at 80 % "
        "| p99 ms at 80 % of patchsight's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| *decode + bare `session.run`* | {1000 / bound:.1f} | {bound:.1f} | 100 % | | | |",
    ]
    for server in servers:
        best = server["saturation"]
        cpu = best["cpu_ms_per_image"]
        half, most = (_three(server["open"].get(f"{share} of its own")) for share in ("50%", "80%"))
        common = server["open"].get("80% of patchsight's", {})
        lines.append(
            f"| {server['label']} | {best['images_per_s']['median']:.1f} "
            f"| {cpu['median']:.1f} ({cpu['least']:.1f}–{cpu['most']:.1f}) | {100 * bound / cpu['median']:.0f} % "
            f"| {half} | {most} | {_ms(common.get('p99_ms'))} |"
        )
    return lines


def _overload(servers: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| | goodput at 2× | at 10× | refused at 10× | a refusal takes, p50 / p99 ms | memory at 10×, MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for server in servers:
        twice, tenfold = (server["overload"].get(times) for times in (2, 10))
        if not (twice and tenfold):
            continue
        refusal = f"{_ms(tenfold['refused_p50_ms'])} / {_ms(tenfold['refused_p99_ms'])}"
        lines.append(
            f"| {server['label']} | {_percent(twice['goodput_of_peak'])} | {_percent(tenfold['goodput_of_peak'])} "
            f"| {_percent(tenfold['refused'])} | {refusal} | {tenfold['memory_mb']} |"
        )
    return lines


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """p99 against the load, a line per server."""
    figure, axes = plt.subplots(figsize=(8.4, 4.2), layout="constrained")
    for server, color in zip(figures["servers"].values(), COLORS, strict=False):
        if server.get("failure"):
            continue
        points = sorted((run["offered_per_s"], run["p99_ms"]) for run in server["open"].values())
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=server["label"], linewidth=1.8, markersize=4)
    axes.set_yscale("log", subs=[])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("offered load, photos/s (Poisson arrivals)")
    axes.set_ylabel("p99 latency, ms")
    axes.axhline(figures["patience_s"] * 1000, color="#999999", linewidth=0.8, linestyle=":")
    at = (0.01, figures["patience_s"] * 900)
    axes.text(
        *at, "refused, or given up by the client", transform=axes.get_yaxis_transform(), fontsize=8, color="#666666"
    )
    axes.grid(alpha=0.25)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _three(run: Mapping[str, Any] | None) -> str:
    return "–" if run is None else " / ".join(_ms(run[f"p{percent}_ms"]) for percent in (50, 95, 99))


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
