"""All encoders of a model repository."""

from pathlib import Path

from patchsight_serve.errors import BundleError
from patchsight_serve.ort_encoder import OrtEncoder

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}  # by device


def bundles(model_repository: Path) -> list[Path]:
    """The bundles' folders, by name: those with an encoder.json. Triton's other models are not ours to judge, and a
    name that begins with a dot is an export that is not finished."""
    return sorted(p.parent for p in model_repository.glob("*/encoder.json") if not p.parent.name.startswith("."))


def needed_bundles(model_repository: Path) -> list[Path]:
    """The same. Raises BundleError if there is none."""
    found = bundles(model_repository)
    if not found:
        what = "has no encoder in it" if model_repository.is_dir() else "is not a folder"
        raise BundleError(
            f"--model-repository {model_repository} {what}: name a folder with encoders, or make one with "
            "patchsight-export RUN MODEL_REPOSITORY/NAME"
        )
    return found


def load_encoders(model_repository: Path, threads: int | None = None, device: str = "cpu") -> dict[str, OrtEncoder]:
    """Load every bundle into ONNX Runtime, onto `device`, "cpu" or "cuda", in the order of their names.

    Raises:
        BundleError: there is none, one of them is damaged, or the device is not usable.
    """
    found = needed_bundles(model_repository)
    return {bundle.name: load_encoder(bundle, threads, device) for bundle in found}


def load_encoder(bundle: Path, threads: int | None = None, device: str = "cpu") -> OrtEncoder:
    """One bundle, as `load_encoders`."""
    return OrtEncoder(bundle, threads, (PROVIDERS[device],))
