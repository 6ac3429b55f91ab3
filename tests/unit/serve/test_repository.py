"""Which folders are encoders, in which order, and what is said when there is none."""

from collections.abc import Callable
from pathlib import Path

import pytest

from patchsight_serve.errors import BundleError
from patchsight_serve.repository import load_encoders


def test_bundles_are_loaded_by_name_and_the_rest_is_left_alone(
    make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    make_bundle(tmp_path / "b")
    make_bundle(tmp_path / "a")
    make_bundle(tmp_path / "c").rename(tmp_path / ".c-7f3a")  # an export under way
    (tmp_path / "resnet-of-triton" / "1").mkdir(parents=True)
    (tmp_path / "README.md").write_text("notes")
    assert list(load_encoders(tmp_path, threads=1)) == ["a", "b"]


@pytest.mark.parametrize("there", [True, False])
def test_no_encoder_names_the_option(tmp_path: Path, there: bool) -> None:
    with pytest.raises(BundleError, match="--model-repository .*(has no encoder|is not a folder)"):
        load_encoders(tmp_path if there else tmp_path / "missing")


def test_one_damaged_bundle_stops_the_start(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    make_bundle(tmp_path / "a")
    with (make_bundle(tmp_path / "b") / "1" / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match="the file was changed"):
        load_encoders(tmp_path)


def test_a_gpu_that_is_not_there_stops_the_start(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    make_bundle(tmp_path / "a")
    try:
        encoder = load_encoders(tmp_path, device="cuda")["a"]
    except BundleError as error:
        assert "a: ONNX Runtime has no usable CUDAExecutionProvider" in error.message  # noqa: PT017 - see below
    else:  # a machine with a GPU
        assert encoder._session.get_providers()[0] == "CUDAExecutionProvider"
