"""A model repository at a glance: one line for each encoder."""

from pathlib import Path

from patchsight_serve.errors import PatchsightError
from patchsight_serve.manifest import Manifest, load_manifest
from patchsight_serve.repository import bundles

COLUMNS = ("name", "sees", "architecture", "MB", "precision", "embedding", "objective", "measured")


def bundles_by_name(model_repository: Path) -> dict[str, Manifest | PatchsightError]:
    """The manifest of each bundle, or what is wrong with it."""
    found: dict[str, Manifest | PatchsightError] = {}
    for bundle in bundles(model_repository):
        try:
            found[bundle.name] = load_manifest(bundle)
        except PatchsightError as error:
            found[bundle.name] = error
    return found


def table(model_repository: Path, found: dict[str, Manifest | PatchsightError]) -> str:
    """For people, in columns as wide as they need to be."""
    if not found:
        return f"no encoder in {model_repository}; make one: patchsight-export SOURCE {model_repository}/NAME"
    sizes = {name: (model_repository / name / "1" / "model.onnx") for name in found}
    rows = [COLUMNS, *(_row(e, sizes[n].stat().st_size) for n, e in found.items() if isinstance(e, Manifest))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    damaged = [f"{name}: DAMAGED: {error}" for name, error in found.items() if isinstance(error, PatchsightError)]
    return "\n".join(lines + damaged)


def _row(manifest: Manifest, size: int) -> tuple[str, ...]:
    width = manifest.embedding_dim * (2 if manifest.recommended == "both" else 1)
    return (
        manifest.name, f"{manifest.image_size} px", manifest.architecture, f"{size / 1e6:.1f}", manifest.precision,
        f"{manifest.recommended}, {width}", manifest.objective, headline(manifest),
    )  # fmt: skip


def headline(manifest: Manifest) -> str:
    """What was measured, as far as it is k-NN: `cifar10-knn 20-NN 63.0 %`."""
    found = []
    for name, values in manifest.measured.items():
        first = values.get("headline") if isinstance(values, dict) else None
        if isinstance(first, dict) and {"k", "accuracy"} <= first.keys():
            found.append(f"{name} {first['k']}-NN {100 * first['accuracy']:.1f} %")
    return ", ".join(found) or "–"
