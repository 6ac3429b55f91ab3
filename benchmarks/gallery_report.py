"""The tables and the plot of `gallery.py`, out of its figures alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from gallery_arm import ARMS, ENOUGH, HALVES
from gallery_peers.contender import SHARES

mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from serving_report import COLORS  # noqa: E402

BARE = ("faiss_lists", "faiss_codes")
EXACT = "patchsight_exact"


def tables(figures: Mapping[str, Any]) -> str:
    """Markdown: filling, searching, filters, then who is missing and why."""
    arms = {name: arm for name, arm in figures["arms"].items() if "failure" not in arm["ask"]}
    ill = [
        f"{arm['label']} is not in the tables: {arm['ask']['failure']}"
        for name, arm in figures["arms"].items()
        if name not in arms
    ]
    said = f"{figures['count']:,} vectors of {figures['dim']} numbers."
    parts = ["\n".join(lines) for lines in (_filling(arms, figures), _searching(arms), _filters(arms))]
    return "\n\n".join([said, *parts, *_ratios(arms), *ill])


def _filling(arms: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    lines = [
        "| | vectors/s added | with the index ready | CPU s in all | safe after an add | disk, × vectors "
        "| cold start, s | fully fast after, s | memory, × vectors |",
        "| --- " * 9 + "|",
    ]
    count, size = figures["count"], figures["count"] * figures["dim"] * 4
    for arm in arms.values():
        fill, asked = arm["fill"], arm["ask"]
        start = f"| {asked['cold_s']:.1f} | {asked['ready_s']:.1f} | {asked['memory_mb'] * 2**20 / size:.2f} |"
        if fill is None:
            lines.append(f"| {arm['label']} | | | | | {start}")
            continue
        both = fill["add_s"] + fill["finish_s"]
        lines.append(
            f"| {arm['label']} | {_rate(count / fill['add_s'])} | {_rate(count / both)} "
            f"| {fill['add_cpu_s'] + fill['finish_cpu_s']:,.0f} | {fill['kept']} | {fill['bytes'] / size:.2f} {start}"
        )
    return lines


def _searching(arms: Mapping[str, Any]) -> list[str]:
    lines = [
        "| | recall at 10, real / made up | p50 / p99 ms, real queries | made up | CPU ms, real | × bare FAISS "
        "| p50 / p99 ms beside writes | with 16 clients | answers/s |",
        "| --- " * 9 + "|",
    ]
    bare = _bare(arms)
    for name, arm in arms.items():
        asked, real = arm["ask"], arm["ask"]["alone"]["real"]
        step = next(step for step in asked["ladder"] if step["effort"] == asked["efforts"]["real"])
        found = " / ".join(_found(step[half]["recall"]) for half in reversed(HALVES))
        ratio = "–" if not bare or name == EXACT else f"{real['p50_ms'] / bare:.2f}"
        star = "" if asked["writes"] else " (no writes)"
        lines.append(
            f"| {arm['label']} | {found} | {_two(real)} | {_two(asked['alone']['made up'])} | {_ms(real['cpu_ms'])} "
            f"| {ratio} | {_two(asked['clients_1'])}{star} | {_two(asked['clients_16'])}{star} "
            f"| {asked['clients_16']['per_s']:,.0f} |"
        )
    return lines


def _filters(arms: Mapping[str, Any]) -> list[str]:
    lines = ["| p50 ms (recall) with a filter | " + " | ".join(SHARES) + " |", "| --- " * (len(SHARES) + 1) + "|"]
    for arm in arms.values():
        for by, found in arm["ask"]["filters"].items():
            cells = (f"{_ms(found[share]['p50_ms'])} ({_found(found[share]['recall'])})" for share in SHARES)
            label = f"{arm['label']}, {by}" if by != "filter" or len(arm["ask"]["filters"]) > 1 else arm["label"]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        if not arm["ask"]["filters"]:
            lines.append(f"| {arm['label']} | none" + " |" * len(SHARES))
    return lines


def _ratios(arms: Mapping[str, Any]) -> list[str]:
    """In words: how much faster than exact."""
    if not {"patchsight", EXACT} <= set(arms):
        return []
    ours, exact = (arms[name]["ask"]["alone"] for name in ("patchsight", EXACT))
    times = " and ".join(f"{exact[half]['p50_ms'] / ours[half]['p50_ms']:.1f}× ({half})" for half in reversed(HALVES))
    return [f"patchsight's approximate search beside its exact one, by p50: {times}."]


def _bare(arms: Mapping[str, Any]) -> float | None:
    """p50 of the faster of FAISS's two that find enough."""
    found = [
        arms[name]["ask"]["alone"]["real"]["p50_ms"]
        for name in BARE
        if name in arms and max(s["real"]["recall"] for s in arms[name]["ask"]["ladder"]) >= ENOUGH
    ]
    return min(found, default=None)


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Recall against p50, a line per contender, for both halves."""
    plot, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained", sharey=True)
    colors = dict(zip(ARMS, COLORS, strict=True))
    for name, arm in figures["arms"].items():
        for half, panel in zip(HALVES, axes, strict=True):
            steps = [step[half] for step in arm["ask"].get("ladder", [])]
            points = [(step["p50_ms"], step["recall"]) for step in steps]
            if points:
                line = {"label": arm["label"], "color": colors[name], "linewidth": 1.8, "markersize": 4}
                panel.plot(*zip(*points, strict=True), "o-", **line)
    for half, panel in zip(HALVES, axes, strict=True):
        panel.set_title(f"{half} queries", fontsize=10)
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("p50, ms, one client")
        panel.set_ylim(0.8, 1.005)
        panel.axhline(ENOUGH, color="#999999", linewidth=0.8, linestyle=":")
        panel.grid(alpha=0.25)
    axes[0].set_ylabel("recall at 10")
    plot.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    plot.savefig(path, dpi=150)
    plt.close(plot)


def _rate(per_s: float) -> str:
    return f"{float(f'{per_s:.3g}'):,.0f}"


def _two(figures: Mapping[str, Any]) -> str:
    return f"{_ms(figures['p50_ms'])} / {_ms(figures['p99_ms'])}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _found(recall: float) -> str:
    return f"{recall:.3f}"
