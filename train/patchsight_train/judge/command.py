"""The work of `patchsight-eval`: judge each source, write result.json and report.html as soon as one is done."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from patchsight_serve.terminal import progress_bar
from patchsight_train.device import pick_device
from patchsight_train.judge.judgement import Judgement, judge
from patchsight_train.judge.page import render
from patchsight_train.judge.ranking import rank_correlations, read_points
from patchsight_train.judge.settings import EvalSettings
from patchsight_train.judge.sheets import draw_all
from patchsight_train.judge.subject import subjects
from patchsight_train.run import commit
from patchsight_train.webpage import write_page


def run(settings: EvalSettings) -> list[dict[str, Any]]:
    """All that result.json holds, a source each. Raises PatchsightError; what was finished before stays on disk."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    settings.out.mkdir(parents=True, exist_ok=True)
    judged: list[tuple[Judgement, dict[str, bytes]]] = []
    with progress_bar() as progress:
        for subject in subjects(settings, device, progress):
            judgement = judge(subject, settings, device, progress)
            task = progress.add_task(f"{subject.name}: pictures", total=None)
            pictures = dict(draw_all(judgement))
            progress.update(task, total=1, completed=1)
            judged.append((judgement, pictures))
            _write(settings, judged)
    results = [judgement.numbers for judgement, _ in judged]
    _print(results, settings.out)
    return results


def _write(settings: EvalSettings, judged: list[tuple[Judgement, dict[str, bytes]]]) -> None:
    """Everything so far: a source that fails later takes nothing away."""
    points = read_points([source for source in settings.source if (source / "metrics.jsonl").is_file()])
    code = commit()
    results = {
        "train": settings.train, "test": settings.test, "seed": settings.seed, "commit": code,
        "encoders": [_finite(judgement.numbers) for judgement, _ in judged],
        "label_free_rank_correlation": _finite(rank_correlations(points)),
    }  # fmt: skip
    write_page(json.dumps(results, indent=1) + "\n", settings.out / "result.json")
    judgement, pictures = judged[-1]
    folder = settings.out / "pictures" / judgement.subject.name
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        (folder / f"{name}.png").write_bytes(png)
    names = [Path(side).parent.name + "/" + Path(side).name for side in (settings.train, settings.test)]
    write_page(render(judged, names[0], names[1], code, points), settings.out / "report.html")


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(results: list[dict[str, Any]], out: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table("encoder", "k-NN (95 %)", "linear (95 %)", "RankMe")
    for numbers in results:
        found, best = numbers["knn"][numbers["recommended"]], numbers["linear"]["best"]
        k = str(found["headline_k"])
        knn, linear = _share(found["accuracy"][k], found["interval_95"][k]), _share(best["test"], best["interval_95"])
        table.add_row(numbers["name"], knn, linear, f"{numbers['representation']['rankme']:.1f}")
    console.print(table)
    for side in ("train", "test"):
        for entry in results[0][side]["skipped"]:
            console.print(f"left out of {side}: {entry['name']}: {entry['reason']}", markup=False)
    console.print(f"{out / 'report.html'}, {out / 'result.json'}", markup=False)


def _share(accuracy: float, interval: tuple[float, float]) -> str:
    return f"{accuracy:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
