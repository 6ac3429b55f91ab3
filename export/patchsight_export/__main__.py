"""`patchsight-export SOURCE MODEL_REPOSITORY/NAME`: parse, wire, run."""

import hashlib
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from patchsight_export.settings import ExportSettings
from patchsight_serve.config import fail
from patchsight_serve.errors import PatchsightError

if TYPE_CHECKING:
    from patchsight_export.source import Source
    from patchsight_export.verify import Check

PROG = "patchsight-export"


def main(argv: Sequence[str] | None = None) -> None:
    settings = ExportSettings.from_command_line(PROG, sys.argv[1:] if argv is None else argv)
    try:
        if settings.source.suffix == ".json":
            measure(settings)
        elif (settings.source / "encoder.json").is_file():
            convert(settings)
        else:
            export(settings)
    except (PatchsightError, OSError) as error:
        fail(PROG, str(error), status=1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def measure(settings: ExportSettings) -> None:
    """Add a measurement to a bundle that is published already."""
    from patchsight_export.repository import record

    record(settings.bundle, settings.source)
    print(f"{settings.source.stem} is now measured in {settings.bundle / 'encoder.json'}")


def convert(settings: ExportSettings) -> None:
    """Publish what is published already at another precision: graph to graph, without the network it was made of."""
    from rich.console import Console

    from patchsight_export.bundle_source import read_bundle
    from patchsight_export.precision import at_precision, check_combination
    from patchsight_export.repository import check_free, publish

    print(f"{PROG}\n{settings.describe()}")
    check_combination(settings, published=True)
    check_free(settings.bundle)
    manifest, graph = read_bundle(settings.source)
    made_of = f"# made of the bundle {manifest.name}, sha256 {manifest.sha256}\n{manifest.recipe}"
    draft = manifest.model_copy(update={"name": settings.bundle.name, "recipe": made_of})
    manifest, model = at_precision(graph, draft, settings, Console())
    publish(settings.bundle, manifest, model)
    print(f"published {settings.bundle}: {len(model) / 1e6:.2f} MB, sha256 {manifest.sha256}")


def export(settings: ExportSettings) -> None:
    """Rebuild the encoder, make the graph, compare it with torch, publish. All is in memory until it is verified."""
    from patchsight_export.repository import check_free, publish

    started = time.perf_counter()
    print(f"{PROG}\n{settings.describe()}")
    check_free(settings.bundle)

    from rich.console import Console

    from patchsight_export.precision import at_precision, check_combination

    check_combination(settings, published=False)

    from patchsight_export.dynamic_size import other_sizes
    from patchsight_export.half_weights import halve, round_to_half, store_half
    from patchsight_export.to_onnx import served, to_onnx, with_metadata
    from patchsight_export.verify import verify
    from patchsight_export.whitening import learn_whitening
    from patchsight_serve.trial_pictures import noise, photos
    from patchsight_train.whitening import SHRINKAGE

    source, whiten, both = read(settings), None, settings.recommend == "both"
    if settings.recommend is not None:
        source = source.recommending(settings.recommend)
    if settings.weights == "fp16":  # before the whitening, which is learned from what is served
        cosine = halve(source.encoder, photos(source.fields["transform"]))
        print(f"weights rounded to fp16: cosine to the original at least {cosine:.6f}")
        source = source.noted("weights rounded to fp16")
    source = source.serving(settings.attention, settings.dynamic_size)
    if settings.scaled_decode:
        source = source.decoding_scaled()
    if settings.whiten is not None:
        whiten, count = learn_whitening(source.encoder, settings.whiten, Console(), both)
        told = f"ZCA, shrinkage {SHRINKAGE}, by {count:,} images of {Path(settings.whiten).name}"
        if settings.weights == "fp16":
            for each in whiten.values():
                round_to_half(each)
        source = source.noted(f"embeddings whitened: {told}")
    draft = source.manifest(settings.bundle.name, sha256="0" * 64)
    when = f", step {source.step:,}" if source.step else ""
    print(f"{draft.objective}, {draft.architecture}: {draft.parameters / 1e6:.2f} M parameters{when}")
    module, size = served(source.encoder, whiten, both, draft.attention), draft.transform.crop
    graph = to_onnx(module, size, tuple(draft.outputs), settings.opset, settings.dynamic_size)
    if settings.weights == "fp16":
        store_half(graph)
    model = with_metadata(graph, draft.metadata())
    pictures = {"noise": noise(size), "photos": photos(draft.transform)}
    checks = verify(model, module, draft.outputs, pictures, other_sizes(draft))
    print("\n".join(verdict(checks, list(draft.outputs))))
    manifest = source.manifest(settings.bundle.name, hashlib.sha256(model).hexdigest())
    if settings.precision != "fp32":
        manifest, model = at_precision(graph, manifest, settings, Console())
    publish(settings.bundle, manifest, model)
    print(
        f"published {settings.bundle}: opset {settings.opset}, {len(model) / 1e6:.2f} MB, sha256 {manifest.sha256}, "
        f"in {time.perf_counter() - started:.1f} s"
    )


def read(settings: ExportSettings) -> "Source":
    """The encoder of a run folder, or a public one."""
    from patchsight_export.public_source import read_public
    from patchsight_export.source import read_run

    if settings.source.is_dir():
        return read_run(settings.source, settings.step)
    source, lines = read_public(settings)
    print("\n".join(lines))
    return source


def verdict(checks: Iterable["Check"], outputs: list[str]) -> list[str]:
    """The checks as a table: a row for each comparison, a column for each output."""
    rows: dict[str, dict[str, float]] = {}
    for check in checks:
        rows.setdefault(check.what, {})[check.output] = check.error
    lines = [f"{'max|a-b| / max|b| against':<30}" + "".join(f"{name:>16}" for name in outputs)]
    lines += [f"{what:<30}" + "".join(f"{errors[name]:>16.1e}" for name in outputs) for what, errors in rows.items()]
    return lines


if __name__ == "__main__":
    main()
