"""The servers that `serving.py` compares: how each is started, and what a request to it looks like."""

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template

from load_generator import http_request
from measure import ROOT
from peer_environment import FOLDER, python_of
from triton_process import free_port

APPS = ROOT / "benchmarks" / "peers"
BF16 = ("--engine", "openvino", "--inference-precision", "bf16")
BOUNDARY = "a-boundary-that-no-photo-has"


@dataclass(frozen=True)
class Terms:
    """What holds for all of them.

    bundle: the encoder's folder. batch: most images of a batch. queue: most images in work at once, for those that can
    be told. port: to listen on. scratch: an empty folder.
    """

    bundle: Path
    batch: int
    queue: int
    port: int
    scratch: Path

    def environment(self) -> dict[str, str]:
        """Variables of the server's process: what the apps in peers/ read, and no telemetry."""
        told = {"BUNDLE": self.bundle.resolve(), "BATCH": self.batch, "QUEUE": self.queue, "PORT": self.port}
        return {
            **os.environ,
            **{f"PEER_{name}": str(value) for name, value in told.items()},
            "PYTHONPATH": f"{ROOT / 'serve'}:{APPS}",
            "BENTOML_HOME": str(self.scratch / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
            "ORT_DISABLE_TELEMETRY": "1",
            "TMPDIR": str(self.scratch),
            "RAY_TMPDIR": str(self.scratch),
        }


@dataclass(frozen=True)
class Contender:
    """command: the server's command line, which may prepare files in `scratch` first; RuntimeError where the server
    cannot be had. request: the bytes that ask for a photo's embedding."""

    label: str
    command: Callable[[Terms], list[str]]
    request: Callable[[bytes], bytes]


def _ours(*flags: str) -> Callable[[Terms], list[str]]:
    def command(terms: Terms) -> list[str]:
        repository = terms.scratch / "repository"  # one encoder, as the others have one
        repository.mkdir()
        (repository / terms.bundle.name).symlink_to(terms.bundle.resolve())
        told = {
            "--port": terms.port, "--model-repository": repository, "--state-dir": terms.scratch / "state",
            "--log-level": "warning", "--threads": 1, "--decode-threads": 1, "--max-batch": terms.batch,
            "--max-queue": terms.queue, "--max-images": terms.queue,
        }  # fmt: skip
        line = [str(part) for flag in told.items() for part in flag]
        return [sys.executable, "-m", "patchsight_serve", "--no-sample-gallery", *line, *flags]

    return command


def _fastapi(terms: Terms) -> list[str]:
    line = ["-m", "uvicorn", "fastapi_app:app", "--app-dir", str(APPS), "--port", str(terms.port)]
    return [str(python_of("fastapi")), *line, "--log-level", "warning", "--no-access-log"]


def _litserve(terms: Terms) -> list[str]:
    return [str(python_of("litserve")), str(APPS / "litserve_app.py"), str(terms.port)]


def _bentoml(_: Terms) -> list[str]:
    line = ["-m", "bentoml", "serve", "bentoml_app:Embedder", "--working-dir", str(APPS)]
    return [str(python_of("bentoml")), *line]


def _ray_serve(terms: Terms) -> list[str]:
    return [str(python_of("ray_serve")), str(APPS / "ray_serve_app.py"), str(terms.port)]


def _triton(terms: Terms) -> list[str]:
    python_of("triton")
    model = terms.scratch / "models" / "embed"
    (model / "1").mkdir(parents=True)
    shutil.copy(APPS / "triton_model.py", model / "1" / "model.py")
    told = {"BATCH": terms.batch, "QUEUE": terms.queue, "PATH": f"{ROOT / 'serve'}:{APPS}"}
    config = Template((APPS / "triton_config.pbtxt").read_text()).substitute(told)
    (model / "config.pbtxt").write_text(config)
    ports = {"http": terms.port, "grpc": free_port(), "metrics": free_port()}
    flags = [part for name, port in ports.items() for part in (f"--{name}-port", str(port))]
    line = ["-m", "patchsight_serve.triton_server", str(FOLDER / "triton"), str(model.parent), *flags]
    return [sys.executable, *line]


def _raw(path: str) -> Callable[[bytes], bytes]:
    headers = {"Content-Type": "image/jpeg", "Accept": "application/octet-stream"}
    return lambda photo: http_request(path, headers, photo)


def form_request(field: str) -> Callable[[bytes], bytes]:
    """Makes requests with the photo as that field of a form."""

    def request(photo: bytes) -> bytes:
        about = f'Content-Disposition: form-data; name="{field}"; filename="photo.jpg"\r\nContent-Type: image/jpeg'
        body = f"--{BOUNDARY}\r\n{about}\r\n\r\n".encode() + photo + f"\r\n--{BOUNDARY}--\r\n".encode()
        return http_request("/embed", {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}, body)

    return request


def _infer(photo: bytes) -> bytes:
    """KServe's protocol with Triton's binary data: a JSON head, then the tensor, a file with its length before it."""
    tensor = struct.pack("<I", len(photo)) + photo
    told = {"name": "photo", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(tensor)}}
    head = json.dumps({"inputs": [told], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return http_request("/v2/models/embed/infer", headers, head + tensor)


CONTENDERS = {
    "ours": Contender("patchsight", _ours("--engine", "onnxruntime"), _raw("/embed")),
    "openvino": Contender("patchsight, OpenVINO", _ours("--engine", "openvino"), _raw("/embed")),
    "bf16": Contender("patchsight, OpenVINO bf16", _ours(*BF16), _raw("/embed")),
    "fastapi": Contender("FastAPI", _fastapi, _raw("/embed")),
    "litserve": Contender("LitServe", _litserve, form_request("photo")),
    "bentoml": Contender("BentoML", _bentoml, form_request("photos")),
    "ray_serve": Contender("Ray Serve", _ray_serve, _raw("/embed")),
    "triton": Contender("Triton (python backend)", _triton, _infer),
}
