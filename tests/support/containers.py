"""A container engine for tests: the one that runs here, else Debian's own, started with a folder of its own. And an
image to begin from, made of Debian's packages, where no registry of images can be reached."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from debian import install

BASE = "patchsight-test/base"
CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")
PACKAGES = {"dockerd": "docker.io", "docker-compose": "docker-compose", "debootstrap": "debootstrap",
            "iptables": "iptables"}  # fmt: skip
PATIENCE_S = 90


class Engine:
    """What `docker` and `docker-compose` say, of the engine at `address` (None: the one they find by themselves)."""

    def __init__(self, address: str | None) -> None:
        self.environment = {**os.environ, **({"DOCKER_HOST": address} if address else {})}

    def run(self, *line: str, cwd: Path | None = None, fails: bool = False) -> str:
        """Both outputs of a command, which has to succeed, or has to fail."""
        merged: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(line, cwd=cwd, env=self.environment, **merged)
        assert (done.returncode != 0) == fails, f"{line}: {done.returncode}\n{done.stdout[-5000:]}"
        return str(done.stdout).strip()

    def docker(self, *arguments: str, fails: bool = False) -> str:
        return self.run("docker", *arguments, fails=fails)

    def inspect(self, container: str) -> dict[str, Any]:
        (told,) = json.loads(self.docker("inspect", container))
        return dict(told)

    def healthy(self, container: str) -> None:
        """Wait until the image's own health check says so."""

        def is_healthy() -> bool:
            return bool(self.inspect(container)["State"].get("Health", {}).get("Status") == "healthy")

        wait(is_healthy, lambda: self.docker("logs", container))

    def make_base(self, folder: Path) -> None:
        """`BASE`: Debian 12 with Python and pip by the names that the official image of Python gives them. Whom this
        machine trusts, it trusts."""
        if self.docker("images", "--quiet", BASE):
            return
        root = folder / "base"
        packages = "--include=python3,python3-venv,python3-pip,ca-certificates"
        self.run("debootstrap", "--variant=minbase", packages, "bookworm", str(root))
        (root / "usr/bin/python").symlink_to("python3")
        for file in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            file.unlink()
        shutil.copy(Path("/") / CERTIFICATES, root / CERTIFICATES)
        self.run("tar", "--create", f"--file={folder}/base.tar", f"--directory={root}", ".")
        shutil.rmtree(root)
        trust = f"ENV PIP_CERT=/{CERTIFICATES} SSL_CERT_FILE=/{CERTIFICATES}"
        self.docker("import", "--change", trust, f"{folder}/base.tar", BASE)


def wait(condition: Callable[[], object], what: str | Callable[[], str]) -> None:
    """what: is waited for, or what to say instead, once it has lasted too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.5)


def answers(engine: Engine) -> bool:
    return subprocess.run(["docker", "info"], env=engine.environment, capture_output=True).returncode == 0


@contextmanager
def running_engine() -> Iterator[Engine]:
    """With `BASE` in it. Needs root where no engine answers."""
    install(PACKAGES)
    folder = Path(tempfile.mkdtemp(prefix="engine-"))  # short: it holds sockets
    found, own = Engine(None), Engine(f"unix://{folder}/socket")
    process = None
    try:
        if not answers(found):
            line = ["dockerd", f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"]
            with (folder / "log").open("wb") as log:
                process = subprocess.Popen([*line, f"--host=unix://{folder}/socket"], stdout=log, stderr=log)
            wait(lambda: answers(own) or process.poll() is not None, (folder / "log").read_text)
            assert process.poll() is None, (folder / "log").read_text()
        engine = own if process else found
        engine.make_base(folder)
        yield engine
    finally:
        if process:
            process.terminate()
            process.wait(timeout=60)
        shutil.rmtree(folder)
