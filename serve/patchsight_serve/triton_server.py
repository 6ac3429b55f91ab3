"""A real Triton on this machine without containers: `python -m patchsight_serve.triton_server ENVIRONMENT MODELS`.

ENVIRONMENT is a virtual environment with `nvidia-pytriton`, of which nothing but the server that it holds is used, ONNX
Runtime, and numpy below 2: `make triton` makes it. That server has the python backend only.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from patchsight_serve.config import CommandSettings, fail
from patchsight_serve.errors import InvalidRequest, PatchsightError

PROG = "triton_server"
SHARED_MEMORY = Path("/dev/shm")
# Where its paths and its Python version are; its own interpreter has to say.
ASK = (
    "import sys, sysconfig as s; "
    "print(s.get_path('platlib'), s.get_config_var('LIBDIR'), '%d.%d' % sys.version_info[:2], sep='\\n')"
)


class TritonServerSettings(CommandSettings):
    """Run NVIDIA Triton, with its python backend, on the models of a folder, until told to stop."""

    model_config = SettingsConfigDict(env_prefix="PATCHSIGHT_TRITON_")
    table = "triton"

    environment: CliPositionalArg[Path] = Field(description="virtual environment with nvidia-pytriton")
    models: CliPositionalArg[Path] = Field(description="folder that `patchsight-models triton --backend python` wrote")
    host: str = Field("127.0.0.1", description="address to listen on")
    http_port: int = Field(8010, description="port of its HTTP interface")
    grpc_port: int = Field(8011, description="port of its gRPC interface: --triton grpc://HOST:PORT")
    metrics_port: int = Field(8012, description="port of its metrics")


def main() -> None:
    settings = TritonServerSettings.from_command_line(PROG, sys.argv[1:])
    with TemporaryDirectory(prefix="triton-") as scratch:
        try:
            command, environment = prepare(settings, Path(scratch))
        except PatchsightError as error:
            fail(PROG, error.message, status=1)
        print(f"Triton on grpc://{settings.host}:{settings.grpc_port}", flush=True)
        server = subprocess.Popen(command, env=environment, start_new_session=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: server.send_signal(number))
        try:
            status = server.wait()
        finally:
            for left in SHARED_MEMORY.glob(f"{prefix(os.getpid())}*"):  # by workers that were killed
                left.unlink(missing_ok=True)
    raise SystemExit(status)


def prefix(pid: int) -> str:
    """Of the names of the shared memory between a server that process `pid` runs and the workers of its models."""
    return f"patchsight_triton_{pid}_"


def prepare(settings: TritonServerSettings, scratch: Path) -> tuple[list[str], dict[str, str]]:
    """The server's command line and environment. The stub that runs a model's Python has to lie beside its backend's
    library, so both are copied into `scratch`, 30 MB.

    Explicit model control lets a gateway load a model anew whose worker has died.

    Raises:
        InvalidRequest: the environment does not have the server, or the folder has no models.
    """
    if not any(settings.models.glob("*/config.pbtxt")):
        raise InvalidRequest(f"{settings.models}: no models there; `patchsight-models triton` writes them")
    python = settings.environment / "bin" / "python"
    if not python.exists():
        raise InvalidRequest(f"{settings.environment}: not a virtual environment: it has no bin/python")
    answer = subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=True).stdout
    packages, libraries, version = answer.splitlines()
    server = Path(packages) / "pytriton" / "tritonserver"
    if not server.is_dir():
        raise InvalidRequest(f"{settings.environment}: has no nvidia-pytriton, which brings the server")
    shutil.copytree(server / "bin", scratch / "bin")
    shutil.copytree(server / "backends" / "python", scratch / "backends" / "python")
    stub = "triton_python_backend_stub"
    shutil.copy2(server / "python_backend_stubs" / version / stub, scratch / "backends" / "python" / stub)
    ports = {"http": settings.http_port, "grpc": settings.grpc_port, "metrics": settings.metrics_port}
    command = [
        str(scratch / "bin" / "tritonserver"),
        f"--model-repository={settings.models.resolve()}",
        f"--backend-directory={scratch / 'backends'}",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--exit-timeout-secs=15",
        f"--backend-config=python,shm-region-prefix-name={prefix(os.getpid())}",
        *(f"--{name}-address={settings.host}" for name in ports),
        *(f"--{name}-port={port}" for name, port in ports.items()),
    ]
    environment = {
        **os.environ,
        "PATH": f"{settings.environment.resolve() / 'bin'}:{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": f"{Path(packages) / 'nvidia_pytriton.libs'}:{libraries}",
    }
    environment.pop("PYTHONPATH", None)
    return command, environment


if __name__ == "__main__":
    main()
