"""The image, compose.yaml and the unit for systemd by a real engine, as docs/operate.md says: built, started, asked,
killed, told to look again, stopped. Not the images that others publish: the base is Debian's Python, Prometheus is
Debian's, and of Grafana there is none."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from containers import BASE, Engine, running_engine, wait
from pages import blocks
from triton_process import free_port

from patchsight_serve.dataset import read_dataset
from patchsight_serve.sample_gallery import SAMPLES

ROOT = Path(__file__).resolve().parents[2]
# Names that nobody else gives: the engine may be one that runs other things.
PROJECT = "patchsight-test"
IMAGE, GPU_IMAGE = f"{PROJECT}/gateway", f"{PROJECT}/gpu"
KEY = "a-key-that-nobody-guesses"
LARGEST_MB = 600  # of what the image has beside its base
SAMPLE_COUNT = 200
# systemd as a container's first process: the least that lets it mount, and the hierarchy that it keeps services in.
HIERARCHY = "/sys/fs/cgroup/systemd"
AS_SYSTEMD = ["--cap-add=SYS_ADMIN", "--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined",
              "--tmpfs=/run", "--tmpfs=/run/lock", f"--volume={HIERARCHY}:{HIERARCHY}"]  # fmt: skip

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def clone(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean clone, and the image built of it."""
    folder = tmp_path_factory.mktemp("clone") / "patchsight"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    engine.docker("build", "--build-arg", f"BASE={BASE}", "--tag", IMAGE, str(folder))
    return folder


class Gateway:
    """The one on `port`, as a client with `key` sees it."""

    def __init__(self, port: int, key: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.headers = {"Authorization": f"Bearer {key}"}
        self.photo = read_dataset(SAMPLES).read(0)

    def embeds(self) -> None:
        assert httpx.post(f"{self.url}/embed", content=self.photo).status_code == 401
        reply = httpx.post(f"{self.url}/embed", content=self.photo, headers=self.headers)
        assert reply.status_code == 200, reply.text
        assert reply.json()["encoder"]["name"] == "simclr-vit-tiny-photos"

    def images(self) -> int:
        return int(httpx.get(f"{self.url}/gallery", headers=self.headers).json()["count"])

    def grows(self) -> None:
        """The sample photos are all there, and one more that this adds."""
        wait(lambda: self.images() == SAMPLE_COUNT, "the sample photos")
        mine = {"content": self.photo, "params": {"id": "mine"}, "headers": self.headers}
        assert httpx.post(f"{self.url}/gallery/images", **mine).status_code == 200
        assert self.images() == SAMPLE_COUNT + 1


@pytest.fixture
def one(engine: Engine, clone: Path) -> Iterator[str]:  # noqa: ARG001
    """A container's name, and its volume's. Both are gone afterwards."""
    yield f"{PROJECT}-one"
    engine.docker("rm", "--force", f"{PROJECT}-one")
    engine.docker("volume", "rm", "--force", f"{PROJECT}-one")


def test_the_image(engine: Engine, one: str) -> None:
    port = free_port()
    start = ["run", "--detach", f"--name={one}", f"--env=PATCHSIGHT_API_KEYS={KEY}", f"--publish=127.0.0.1:{port}:8000",
             f"--volume={one}:/state", IMAGE]  # fmt: skip
    engine.docker(*start)
    engine.healthy(one)
    gateway = Gateway(port, KEY)
    gateway.embeds()
    gateway.grows()
    left_out = "import importlib.util as u; print([n for n in ('torch', 'timm', 'pytest') if u.find_spec(n)])"
    assert engine.docker("exec", one, "python", "-c", left_out) == "[]"
    assert engine.docker("exec", one, "id", "--user") == "10001"
    assert int(engine.docker("exec", one, "du", "-sm", "/opt/patchsight").split()[0]) < LARGEST_MB
    engine.docker("stop", "--time=60", one)
    assert engine.inspect(one)["State"]["ExitCode"] == 0
    engine.docker("rm", one)
    engine.docker(*start)  # another container on the same volume
    engine.healthy(one)
    assert gateway.images() == SAMPLE_COUNT + 1
    assert "no API key is set" in engine.docker("run", "--rm", IMAGE, fails=True)


def test_the_image_with_cuda_says_that_there_is_no_gpu(engine: Engine, clone: Path) -> None:
    """Where there is one, it is not left unused by mistake."""
    arguments = ["--build-arg", f"BASE={BASE}", "--build-arg", "EXTRAS=gpu", "--tag", GPU_IMAGE]
    engine.docker("build", *arguments, str(clone))
    line = ["run", "--rm", "--env=PATCHSIGHT_ALLOW_ANONYMOUS=1", GPU_IMAGE, "--device", "cuda"]
    assert "no usable CUDAExecutionProvider" in engine.docker(*line, fails=True)
    engine.docker("rmi", GPU_IMAGE)


@pytest.fixture
def composed(engine: Engine, clone: Path) -> Iterator[tuple[Callable[..., str], Gateway]]:
    """`compose(…)` of what compose.yaml says, on a free port, with Debian's Prometheus and the secrets of
    docs/operate.md. Debian's docker-compose is older than `name:`, so it is told the name."""
    recipe = f"FROM {BASE}\nRUN apt-get update && apt-get install --yes --no-install-recommends prometheus && "
    recipe += 'install --directory --owner=nobody /prometheus\nUSER nobody\nENTRYPOINT ["prometheus"]\n'
    (clone / "prometheus").mkdir()
    (clone / "prometheus" / "Dockerfile").write_text(recipe)
    engine.docker("build", f"--tag={PROJECT}/prometheus", str(clone / "prometheus"))
    (steps,) = [body for _, _, body in blocks((ROOT / "docs/operate.md").read_text()) if "secrets/metrics_key" in body]
    secrets, last = steps.strip().rsplit("\n", 1)
    assert last == "docker compose up -d"
    subprocess.run(["bash", "-ec", secrets], cwd=clone, check=True)
    port = free_port()
    edits = {r"^name: .*": "", r"image: patchsight$": f"image: {IMAGE}", r"127\.0\.0\.1:8000:": f"127.0.0.1:{port}:",
             r"prom/prometheus:\S+": f"{PROJECT}/prometheus"}  # fmt: skip
    text = (clone / "compose.yaml").read_text()
    for pattern, here in edits.items():
        text, count = re.subn(pattern, here, text, flags=re.MULTILINE)
        assert count == 1, pattern
    (clone / "here.yaml").write_text(text)

    def compose(*arguments: str) -> str:
        line = ["docker-compose", f"--project-name={PROJECT}", "--file=here.yaml", *arguments]
        return engine.run(*line, cwd=clone)

    yield compose, Gateway(port, (clone / "secrets" / "metrics_key").read_text().strip())
    compose("down", "--volumes")
    engine.docker("rmi", f"{PROJECT}/prometheus")


def test_compose(engine: Engine, composed: tuple[Callable[..., str], Gateway]) -> None:
    compose, gateway = composed
    compose("up", "--detach", "gateway", "prometheus")
    name = f"{PROJECT}_gateway_1"
    engine.healthy(name)
    gateway.embeds()
    gateway.grows()
    locked_up(engine, name)
    (network,) = engine.inspect(f"{PROJECT}_prometheus_1")["NetworkSettings"]["Networks"].values()
    watch = f"http://{network['IPAddress']}:9090"
    wait(lambda: value(watch, 'up{job="patchsight"}') == 1, "Prometheus reads the gateway's metrics with the key")
    wait(lambda: value(watch, "patchsight_gallery_images") == SAMPLE_COUNT + 1, "and what they say")
    rules = httpx.get(f"{watch}/api/v1/rules").json()["data"]["groups"][0]["rules"]
    assert {rule["name"] for rule in rules} >= {"PatchsightDown", "PatchsightDiskFull"}

    compose("kill", "-s", "HUP", "gateway")
    wait(lambda: "reloaded: added none" in engine.docker("logs", name), "it looks for new encoders")
    before = engine.inspect(name)["State"]
    subprocess.run(["kill", "-9", str(before["Pid"])], check=True)
    wait(lambda: engine.inspect(name)["State"]["StartedAt"] != before["StartedAt"], "it is started again")
    engine.healthy(name)
    assert gateway.images() == SAMPLE_COUNT + 1
    compose("stop", "gateway")
    assert engine.inspect(name)["State"]["ExitCode"] == 0
    compose("down")
    compose("up", "--detach", "gateway")
    engine.healthy(name)
    assert gateway.images() == SAMPLE_COUNT + 1


def locked_up(engine: Engine, name: str) -> None:
    """Nothing but its volume and /tmp can be written; no capability, nor a way to one."""
    assert "Read-only file system" in engine.docker("exec", name, "touch", "/here", fails=True)
    engine.docker("exec", name, "touch", "/state/here", "/tmp/here")
    status = engine.docker("exec", name, "cat", "/proc/1/status")
    assert re.findall(r"^Cap\w+:\s+(\w+)$", status, re.MULTILINE) == ["0" * 16] * 5
    assert "NoNewPrivs:\t1" in status


def value(prometheus: str, query: str) -> float | None:
    try:
        found = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}).json()["data"]["result"]
    except httpx.TransportError:
        return None  # not listening yet
    return float(found[0]["value"][1]) if found else None


@pytest.fixture
def machine(engine: Engine, clone: Path, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """`machine(command)`: what a shell says in a container whose first process is systemd, with our unit."""
    if not Path(HIERARCHY).is_dir():
        pytest.skip("systemd in a container is started by way of cgroup v1, which this machine does not have")
    recipe = f"""
        FROM {BASE}
        RUN apt-get update && apt-get install --yes --no-install-recommends systemd procps
        COPY --from={IMAGE} /opt/patchsight /opt/patchsight
        COPY patchsight.service /etc/systemd/system/
        COPY environment /etc/patchsight/environment
        RUN chmod 600 /etc/patchsight/environment && systemctl enable patchsight
        STOPSIGNAL SIGRTMIN+3
        ENTRYPOINT ["/lib/systemd/systemd"]
    """
    (tmp_path / "Dockerfile").write_text(recipe)
    (tmp_path / "environment").write_text(f"PATCHSIGHT_API_KEYS='{KEY}'\n")
    shutil.copy(clone / "deploy" / "patchsight.service", tmp_path)
    engine.docker("build", f"--tag={PROJECT}/machine", str(tmp_path))
    engine.docker("run", "--detach", f"--name={PROJECT}-machine", *AS_SYSTEMD, f"{PROJECT}/machine")
    yield lambda command: engine.docker("exec", f"{PROJECT}-machine", "sh", "-c", command)
    engine.docker("rm", "--force", f"{PROJECT}-machine")
    engine.docker("rmi", f"{PROJECT}/machine")


def test_the_unit(machine: Callable[[str], str]) -> None:
    def told(name: str) -> str:
        return machine(f"systemctl show --property={name} --value patchsight")

    asked = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/readyz').status)"

    def ready() -> bool:
        return machine(f'python -c "{asked}" 2>&1 || true').endswith("200")

    wait(ready, "it is ready")
    status = machine(f"cat /proc/{told('MainPID')}/status")
    uid = int(re.findall(r"^Uid:\s+(\d+)", status, re.MULTILINE)[0])
    assert 61184 <= uid <= 65519  # one that systemd made up for it
    assert re.findall(r"^CapEff:\s+(\w+)$", status, re.MULTILINE) == ["0" * 16]
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    machine("systemctl reload patchsight")
    wait(lambda: "reloaded: added none" in machine("journalctl --unit=patchsight --no-pager"), "it looks for encoders")
    machine(f"kill -9 {told('MainPID')}")
    wait(lambda: told("NRestarts") == "1" and ready(), "it is started again")
    machine("systemctl stop patchsight")
    assert (told("Result"), told("ExecMainStatus")) == ("success", "0")
