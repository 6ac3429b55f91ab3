"""Which engine an encoder gets, and what is said of it."""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from patchsight_serve import loader, openvino_encoder
from patchsight_serve.errors import BundleError
from patchsight_serve.loader import Loader
from patchsight_serve.settings import ServeSettings
from patchsight_serve.trial import Trial

SAME = Trial(speed=1.3, difference=1e-6, cosine=1.0)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """What the next trials find, the last one again and again; each that is made is taken off."""
    coming = [SAME]

    def compare(*_: object) -> Trial:
        return coming.pop(0) if len(coming) > 1 else coming[0]

    monkeypatch.setattr(loader, "compare", compare)
    return coming


def engine(bundle: Path, tmp_path: Path, **settings: Any) -> tuple[str, str]:
    runtime = Loader(ServeSettings(threads=1, state_dir=tmp_path / "state", **settings)).load(bundle).runtime
    return runtime.engine, runtime.precision


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        (SAME, "openvino"),
        (replace(SAME, speed=1.09), "onnxruntime"),
        (replace(SAME, difference=2e-4), "onnxruntime"),
        (replace(SAME, difference=float("nan")), "onnxruntime"),
    ],
)
def test_openvino_is_taken_where_it_is_faster_and_the_same(
    tiny_bundle: Path, tmp_path: Path, trials: list[Trial], found: Trial, taken: str
) -> None:
    trials[:] = [found]
    assert engine(tiny_bundle, tmp_path) == (taken, "fp32")


def test_a_real_trial(tiny_bundle: Path, tmp_path: Path) -> None:
    settings = ServeSettings(threads=1, state_dir=tmp_path, engine="openvino")
    assert Loader(settings).load(tiny_bundle).runtime.cosine == pytest.approx(1.0, abs=1e-5)
    (found,) = json.loads((tmp_path / "engines.json").read_text()).values()
    assert found["difference"] < 1e-5
    assert 0.01 < found["speed"] < 100


def test_the_second_start_tries_nothing(
    make_bundle: Callable[..., Path], tmp_path: Path, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = [make_bundle(tmp_path / "r" / "a"), make_bundle(tmp_path / "r" / "b", license="mine")]
    trials[:] = [SAME, replace(SAME, speed=0.9)]
    assert [engine(bundle, tmp_path)[0] for bundle in bundles] == ["openvino", "onnxruntime"]

    def never(*_: object) -> Trial:
        raise AssertionError("tried again")

    monkeypatch.setattr(loader, "compare", never)
    assert [engine(bundle, tmp_path)[0] for bundle in bundles] == ["openvino", "onnxruntime"]
    monkeypatch.setitem(sys.modules, "openvino", None)  # not even loaded, where it was not taken
    assert engine(bundles[1], tmp_path)[0] == "onnxruntime"


@pytest.mark.parametrize("other", ["threads", "processor", "_versions"])
def test_what_a_trial_depends_on_makes_another_one(
    tiny_bundle: Path, tmp_path: Path, trials: list[Trial], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    trials[:] = [SAME, replace(SAME, speed=0.9)]
    assert engine(tiny_bundle, tmp_path)[0] == "openvino"
    if other == "threads":
        settings = ServeSettings(threads=2, state_dir=tmp_path / "state")
        assert Loader(settings).load(tiny_bundle).runtime.engine == "onnxruntime"
        return
    monkeypatch.setattr(loader, other, lambda: "another")
    assert engine(tiny_bundle, tmp_path)[0] == "onnxruntime"


def test_without_openvino_nothing_is_tried_or_said(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(loader, "find_spec", lambda _: None)
    assert engine(tiny_bundle, tmp_path) == ("onnxruntime", "fp32")
    assert engine(tiny_bundle, tmp_path, engine="onnxruntime") == ("onnxruntime", "fp32")
    assert not caplog.messages
    assert not (tmp_path / "state").exists()


def test_openvino_asked_for_and_not_there_is_an_error(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for asked in ({"engine": "openvino"}, {"inference_precision": "bf16"}):
        with pytest.raises(BundleError, match=r"patchsight\[openvino\]"):
            engine(tiny_bundle, tmp_path, **asked)


def test_what_openvino_cannot_read_stays_with_onnx_runtime(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise BundleError("tiny: OpenVINO cannot load 1/model.onnx: Attention-23")

    monkeypatch.setattr(loader, "OpenvinoEncoder", refuse)
    assert engine(tiny_bundle, tmp_path) == ("onnxruntime", "fp32")
    assert "encoder tiny stays with ONNX Runtime: tiny: OpenVINO cannot load 1/model.onnx: Attention-23" in caplog.text
    with pytest.raises(BundleError, match="Attention-23"):
        engine(tiny_bundle, tmp_path, engine="openvino")


def test_a_damaged_bundle_is_an_error_whatever_the_engine(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny")
    with (bundle / "1" / "model.onnx").open("ab") as file:
        file.write(b"x")
    for choice in ("auto", "onnxruntime", "openvino"):
        with pytest.raises(BundleError, match="the file was changed"):
            engine(bundle, tmp_path, engine=choice)


def test_a_processor_is_known_by_what_it_can_do(tmp_path: Path) -> None:
    """Virtual machines hide which one it is: this name stands on some with bf16 and on some without."""
    told = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Processor\nflags\t\t: fpu avx512f{}\n"
    names = []
    for i, more in enumerate(("", " amx_bf16", "")):
        cpuinfo = tmp_path / str(i)
        cpuinfo.write_text(told.format(more))
        names.append(loader.processor(cpuinfo))
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("Intel(R) Xeon(R) Processor ") for name in names)
    assert loader.processor(tmp_path / "none")


def test_bf16_is_refused_on_a_processor_without(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_encoder, "capabilities", lambda _: ["FP32"])
    with pytest.raises(BundleError, match="computes nothing in bf16"):
        engine(tiny_bundle, tmp_path, inference_precision="bf16")


def test_bf16_is_taken_where_the_embeddings_stay_and_the_cosine_is_told(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX512 OpenVINO emulates bf16 where the processor has none, so that its numbers can be judged."""
    monkeypatch.setattr(openvino_encoder, "capabilities", lambda _: ["FP32", "BF16"])
    settings = ServeSettings(threads=1, state_dir=tmp_path, inference_precision="bf16")
    runtime = Loader(settings).load(tiny_bundle).runtime
    assert (runtime.engine, runtime.precision) == ("openvino", "bf16")
    assert runtime.cosine is not None
    assert 0.999 <= runtime.cosine <= 1.0


def test_an_encoder_that_bf16_would_turn_stays_in_fp32_and_that_is_said(
    tiny_bundle: Path, tmp_path: Path, trials: list[Trial], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(openvino_encoder, "capabilities", lambda _: ["FP32", "BF16"])
    turned = Trial(speed=2.0, difference=0.1, cosine=0.9989)
    trials[:] = [turned, SAME]
    assert engine(tiny_bundle, tmp_path, inference_precision="bf16") == ("openvino", "fp32")
    assert "encoder tiny stays in fp32: in bf16 its embeddings have a cosine of 0.99890" in caplog.text
    trials[:] = [turned, replace(SAME, speed=0.5)]
    assert engine(tiny_bundle, tmp_path / "2", inference_precision="bf16") == ("onnxruntime", "fp32")
    trials[:] = [turned, replace(SAME, speed=0.5)]
    asked = {"inference_precision": "bf16", "engine": "openvino"}
    assert engine(tiny_bundle, tmp_path / "3", **asked) == ("openvino", "fp32")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"engine": "onnxruntime", "inference_precision": "bf16"}, "needs OpenVINO"),
        ({"device": "cuda", "engine": "openvino"}, "--engine openvino is for --device cpu, not cuda"),
        ({"device": "cuda", "inference_precision": "bf16"}, "--inference-precision bf16 is for --device cpu"),
        ({"triton": "grpc://localhost:8001", "engine": "openvino"}, "with --triton, Triton runs them"),
    ],
)
def test_settings_that_contradict_each_other(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ServeSettings(**asked)
