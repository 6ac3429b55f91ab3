"""How fast and how exact is ONNX Runtime's CUDA provider, in which precision, beside torch on the same GPU?

    python benchmarks/gpu_serving.py                # five minutes on one H200; needs patchsight[export,gpu]
    python benchmarks/gpu_serving.py --device cpu --brief --random   # that it runs at all

Two shipped bundles, as they are served, and ViT-S/16 and ViT-B/16 at 224 px with random weights. Each is exported anew
in several ways (gpu_graphs.py). Pictures go in as numpy arrays and numbers come out as such: the way over PCIe is in
every rate. Rates are batch over the median time of a run. Errors are max|a − b| / max|b| against fp32 on the CPU. All
of an encoder is loaded, compiled and warmed up first, then timed in one go, so that another process (`--pause PID`)
stops only for that. Writes `benchmarks/results/gpu_serving.json`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from gpu_graphs import EMBEDDINGS, graphs
from measure import ROOT, paused, publish, save
from outputs import Plain
from torch import Tensor

from patchsight_serve.ort_encoder import OPTIONS, OrtEncoder
from patchsight_serve.repository import PROVIDERS
from patchsight_serve.trial_pictures import noise
from patchsight_train.architecture import SIZES, ViTConfig
from patchsight_train.initial import read_encoder
from patchsight_train.vit import ViT

BUNDLES = ("simclr-vit-tiny-cifar10-long", "simclr-vit-tiny-photos")
RANDOM = {
    "ViT-S/16, 224 px": ViTConfig(image_size=224, patch_size=16, **SIZES["small"]),  # type: ignore[arg-type]
    "ViT-B/16, 224 px": ViTConfig(image_size=224, patch_size=16, **SIZES["base"]),  # type: ignore[arg-type]
}
FULL, BRIEF = (1, 8, 32, 64, 128, 256), (1, 32, 256)
Run = Callable[[np.ndarray], Any]


MANY = ("tf32", "fp16")  # at more batch sizes, and with all outputs too


def session(model: bytes, device: str, extra: dict[str, str], profile: Path | None = None) -> ort.InferenceSession:
    provider = PROVIDERS[device]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    settings = {**OPTIONS.get(provider, {}), **extra} if device == "cuda" else {}
    found = ort.InferenceSession(model, options, providers=[provider], provider_options=[settings])
    assert provider in found.get_providers(), f"{provider} does not start"
    return found


def placement(model: bytes, device: str, extra: dict[str, str], images: np.ndarray) -> dict[str, Any]:
    """Operators run by provider, and copies between them, of one run for the embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(model, device, extra, Path(folder) / "profile")
        profiled.run(list(EMBEDDINGS), {"image": images})
        events = json.loads(Path(profiled.end_profiling()).read_text())
    nodes: dict[str, Counter[str]] = {}
    for event in events:
        told = event.get("args", {})
        if event.get("cat") == "Node" and "provider" in told:
            nodes.setdefault(told["provider"], Counter())[told["op_name"]] += 1
    return {provider: dict(counts.most_common()) for provider, counts in nodes.items()}


def errors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """max|a − b| / max|b| of each output, and the least cosine of a CLS embedding."""
    row = {name: float(np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max()) for name in found}
    a, b = found["cls_embedding"], wanted["cls_embedding"]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return {name: float(f"{value:.3g}") for name, value in row.items()} | {"least_cosine": float(cosine.min())}


class Case:
    """One encoder: its graphs, loaded and warmed up; then their rates."""

    def __init__(self, name: str, encoder: ViT, arguments: argparse.Namespace) -> None:
        self.name, self.encoder, self.device = name, encoder.eval(), arguments.device
        self.size, self.seconds, self.brief = encoder.config.image_size, arguments.seconds, arguments.brief
        self.found: dict[str, Any] = {"errors": {}, "nodes": {}, "failed": {}, "first_run_ms": {}, "images_per_s": {}}
        self.runs: dict[str, tuple[Run, tuple[int, ...]]] = {}

    def prepare(self) -> None:
        images = noise(self.size, 8)
        reference: dict[str, np.ndarray] | None = None
        for name, make, extra in graphs(self.encoder):
            start = time.perf_counter()
            try:
                model = make().SerializeToString()
                if reference is None:
                    reference = results(session(model, "cpu", {}), images)
                loaded = session(model, self.device, extra)
                self.found["errors"][name] = errors(results(loaded, images), reference)
                self.found["nodes"][name] = placement(model, self.device, extra, images)
                self.add(name, loaded)
            except (
                Exception
            ) as error:  # a graph that does not run is a finding, and neither library has a base of its own
                self.found["failed"][name] = f"{type(error).__name__}: {error}"[:600]
            print(
                f"{self.name}: {name}, {time.perf_counter() - start:.1f} s",
                self.found["failed"].get(name, ""),
                flush=True,
            )
        self.add_torch()
        for name, (run, batches) in self.runs.items():
            self.found["first_run_ms"][name] = {b: first_run(run, noise(self.size, b)) for b in batches}

    def add(self, name: str, loaded: ort.InferenceSession) -> None:
        batches: tuple[int, ...] = FULL if name in MANY else BRIEF
        batches = batches[:2] if self.brief else batches
        self.runs[name] = (lambda images: loaded.run(list(EMBEDDINGS), {"image": images}), batches)
        if name in MANY:
            self.runs[f"{name}, all outputs"] = (lambda images: loaded.run(None, {"image": images}), batches[-1:])

    def add_torch(self) -> None:
        device = torch.device(self.device)
        module = Plain(self.encoder).to(device).eval()
        compiled = torch.compile(module, dynamic=False)
        batches: tuple[int, ...] = BRIEF[:2] if self.brief else BRIEF

        def run(images: np.ndarray, forward: Callable[[Tensor], Any], dtype: torch.dtype) -> list[np.ndarray]:
            half = dtype != torch.float32
            with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                return [y.float().cpu().numpy() for y in forward(torch.from_numpy(images).to(device))]

        self.runs["torch fp32"] = (lambda images: run(images, module, torch.float32), batches)
        self.runs["torch bf16"] = (lambda images: run(images, module, torch.bfloat16), batches)
        if self.device == "cuda":
            self.runs["torch bf16, compiled"] = (lambda images: run(images, compiled, torch.bfloat16), batches[-1:])

    def measure(self) -> None:
        for name, (run, batches) in self.runs.items():
            rates = {b: round(b / median_time(run, noise(self.size, b), self.seconds), 1) for b in batches}
            self.found["images_per_s"][name] = rates
            print(f"{self.name:<24} {name:<26}", rates, flush=True)


def results(loaded: ort.InferenceSession, images: np.ndarray) -> dict[str, np.ndarray]:
    names = [output.name for output in loaded.get_outputs()]
    return dict(zip(names, loaded.run(names, {"image": images}), strict=True))


def first_run(run: Run, images: np.ndarray) -> float:
    """Milliseconds of the first run with a batch of a new size; it also warms up."""
    start = time.perf_counter()
    run(images)
    return round((time.perf_counter() - start) * 1000, 1)


def median_time(run: Run, images: np.ndarray, seconds: float) -> float:
    times: list[float] = []
    run(images)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def as_served(name: str, device: str, seconds: float) -> dict[str, Any]:
    """A shipped bundle through `OrtEncoder`, as the server runs it: errors against the CPU, and rates of both."""
    bundle = ROOT / "model_repository" / name
    found, wanted = (OrtEncoder(bundle, providers=(PROVIDERS[d],)) for d in (device, "cpu"))
    outputs = list(found.manifest.outputs)
    embedding = [f"{found.manifest.recommended}_embedding"]
    images = noise(found.manifest.image_size, 32)
    return {
        "errors": errors(found.run(images, outputs), wanted.run(images, outputs)),
        "images_per_s, batch 32": {
            d: round(32 / median_time(lambda x, e=e: e.run(x, embedding), images, seconds), 1)  # type: ignore[misc]
            for d, e in ((device, found), ("cpu", wanted))
        },
    }


@torch.no_grad()
def random_vit(config: ViTConfig) -> ViT:
    """No two tensors of it are equal: the exporter would make one of them, which the conversion to fp16 stumbles on."""
    encoder = ViT(config)
    for parameter in encoder.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(PROVIDERS), default="cuda")
    parser.add_argument("--seconds", type=float, default=0.25, help="of one rate")
    parser.add_argument("--brief", action="store_true", help="small encoders and batches alone")
    parser.add_argument("--pause", type=int, help="process that stands still while rates are taken")
    parser.add_argument("--bundles", nargs="*", default=list(BUNDLES), help="which of the shipped encoders")
    parser.add_argument("--random", nargs="*", default=list(RANDOM), help="which of the encoders with random weights")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    start = time.perf_counter()
    encoders = {name: read_encoder(ROOT / "model_repository" / name)[0] for name in arguments.bundles}
    encoders |= {name: random_vit(RANDOM[name]) for name in arguments.random}
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    figures: dict[str, Any] = {"device": device, "onnxruntime": ort.__version__, "encoders": {}}
    for name, encoder in encoders.items():
        case = Case(name, encoder, arguments)  # type: ignore[arg-type]
        figures["encoders"][name] = case.found
        case.prepare()
        save("gpu_serving", figures)
        with paused(arguments.pause):
            if name in arguments.bundles:
                case.found["as served"] = as_served(name, arguments.device, arguments.seconds)
                print(json.dumps(case.found["as served"]), flush=True)
            case.measure()
        figures["seconds"] = round(time.perf_counter() - start, 1)
        print(save("gpu_serving", figures), figures["seconds"], flush=True)
    publish("gpu_serving", table(figures["encoders"]))


def table(encoders: dict[str, Any]) -> str:
    """Images a second with batches of 32 and of 256, embeddings alone; a row for each way."""
    lines = [f"| batch 32 · 256 | {' | '.join(encoders)} |", "| --- |" + " --- |" * len(encoders)]
    ways = next(iter(encoders.values()))["images_per_s"]
    for way in [way for way in ways if "all outputs" not in way]:
        rates = [{int(b): rate for b, rate in found["images_per_s"][way].items()} for found in encoders.values()]
        cells = [" · ".join(f"{rate[b]:,.0f}" if b in rate else "–" for b in (32, 256)) for rate in rates]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
