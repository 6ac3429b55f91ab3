"""`result.json` of a fine-tuning: what came out, by how many labels and trained parameters, in what time."""

import json
from typing import Any

from rich.console import Console

from patchsight_train.accuracy import Accuracy, measure
from patchsight_train.data import Images
from patchsight_train.finetune_loop import FineTuner
from patchsight_train.run import read_config


def conclude(tuner: FineTuner, train: Images, test: Images, val: Images | None) -> None:
    """Classify the test images, and write and say how that went; beside the old file, in whose place it is put."""
    accuracy = measure(tuner.objective, test, tuner.device)
    values = result(tuner, accuracy, len(train), test.class_names)
    if val is not None:
        values["val_top1"] = measure(tuner.objective, val, tuner.device).top1
    path = tuner.run / "result.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)
    say(tuner.console, values)


def result(tuner: FineTuner, accuracy: Accuracy, labelled: int, names: list[str] | None) -> dict[str, Any]:
    """labelled: images that were trained on. Times are of training, its evaluations and its start, over all starts."""
    config, parameters = read_config(tuner.run), list(tuner.objective.parameters())
    return {
        "top1": accuracy.top1,
        "interval_95": accuracy.interval,
        "test_images": int(accuracy.total.sum()),
        "labelled_images": labelled,
        "scratch": config["scratch"],
        "blocks": config["blocks"],
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
        "steps": tuner.step,
        "wall_minutes": tuner.stopwatch.wall_s / 60,
        "cpu_minutes": tuner.stopwatch.cpu_s / 60,
        "commit": config["commit"],
        "per_class": accuracy.per_class(names),
    }


def say(console: Console, values: dict[str, Any]) -> None:
    """The headline."""
    low, high = (100 * x for x in values["interval_95"])
    found = f"top-1 {100 * values['top1']:.1f} % (95 % interval {low:.1f} to {high:.1f})"
    by = f"{values['labelled_images']:,} labelled ones and {values['trained_parameters']:,} trained parameters"
    line = f"{found} of {values['test_images']:,} test images, by {by}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
