"""A bundle is there whole or not at all, and never changes."""

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from patchsight_export import repository
from patchsight_export.repository import check_free, publish, record
from patchsight_serve.errors import BundleError, Conflict, InvalidRequest
from patchsight_serve.manifest import Manifest, load_manifest

MODEL = b"a graph, as far as files are concerned"


@pytest.fixture
def signed(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"sha256": hashlib.sha256(MODEL).hexdigest()})


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_published_bundle_can_be_read(tmp_path: Path, signed: Manifest) -> None:
    bundle = tmp_path / "new" / "tiny"
    publish(bundle, signed, MODEL)
    assert load_manifest(bundle) == signed
    assert content(bundle).keys() == {"1/model.onnx", "encoder.json", "config.pbtxt"}
    assert [p.name for p in bundle.parent.iterdir()] == ["tiny"]


def test_an_existing_name_is_refused(tmp_path: Path, signed: Manifest) -> None:
    bundle = tmp_path / "tiny"
    publish(bundle, signed, MODEL)
    before = content(tmp_path)
    with pytest.raises(Conflict, match=r"tiny exists, and a bundle never changes: choose another name"):
        publish(bundle, signed.model_copy(update={"data": "other"}), MODEL + b"!")
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["empty", "file", "dangling"])
def test_whatever_has_the_name_keeps_it(tmp_path: Path, signed: Manifest, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(Conflict, match="choose another name"):
        publish(tmp_path / name, signed, MODEL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "empty", "file"]


@pytest.mark.parametrize(
    "path", ["../x", "repository/../x", "repository/..", ".", "", "repository/.hidden", "repository/a b", "a/-x", "ü",
             "repository/" + "x" * 129],
)  # fmt: skip
def test_a_name_that_no_bundle_can_have(path: str) -> None:
    with pytest.raises(InvalidRequest, match="not the name of a bundle; write MODEL_REPOSITORY/NAME"):
        check_free(Path(path))


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, signed: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every write in turn."""
    for broken in range(3):
        writes = 0

        def write(path: Path, content: bytes, broken: int = broken) -> None:
            nonlocal writes
            writes += 1
            path.write_bytes(content[: len(content) // 2])
            if writes > broken:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(repository, "_write", write)
            with pytest.raises(OSError, match="No space left"):
                publish(tmp_path / "tiny", signed, MODEL)
        assert list(tmp_path.iterdir()) == []
    publish(tmp_path / "tiny", signed, MODEL)


KILLED = """
import os, pathlib, signal, sys
from patchsight_export import repository
from patchsight_serve.manifest import Manifest, load_manifest

root, model = pathlib.Path(sys.argv[1]), sys.argv[2].encode()
manifest = Manifest.model_validate_json(sys.stdin.read())
states = []
for moment in range(100):
    bundle = root / str(moment) / manifest.name
    child = os.fork()
    if not child:
        real, calls = os.fsync, 0

        def fsync(descriptor):
            global calls
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            real(descriptor)

        os.fsync = fsync
        repository.publish(bundle, manifest, model)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if bundle.exists():
        load_manifest(bundle)  # raises where it is not whole
    states.append("whole" if bundle.exists() else "absent")
    if status == 0:
        break
    if not bundle.exists():
        repository.publish(bundle, manifest, model)  # the rest of the killed one is no obstacle
        load_manifest(bundle)
        assert [p.name for p in bundle.parent.iterdir()] == [manifest.name]
print(" ".join(states))
"""


def test_killed_at_any_moment(tmp_path: Path, signed: Manifest) -> None:
    """SIGKILL before each fsync in turn: the bundle is absent or whole, and the next export of that name works."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), MODEL.decode()],
        input=signed.model_dump_json(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Three files, two folders, the rename, the repository; and once without a kill.
    assert done.stdout.split() == ["absent"] * 5 + ["whole"] * 2


def test_of_two_at_once_one_wins(tmp_path: Path, signed: Manifest) -> None:
    results: list[str] = []

    def attempt() -> None:
        try:
            publish(tmp_path / "tiny", signed, MODEL)
            results.append("published")
        except Conflict:
            results.append("refused")

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["published"] + ["refused"] * 7
    assert load_manifest(tmp_path / "tiny") == signed


def test_a_measurement_keeps_the_identity(tmp_path: Path, signed: Manifest) -> None:
    bundle = tmp_path / "repository" / "tiny"
    publish(bundle, signed, MODEL)
    before = content(bundle)
    knn = tmp_path / "cifar10-knn.json"
    told = {"protocol": {"k": 20}, "encoder": {"name": "tiny", "sha256": signed.sha256}, "accuracy": {"20": 0.5}}
    knn.write_text(json.dumps(told))
    record(bundle, knn)
    other = tmp_path / "linear.json"
    other.write_text('{"accuracy": 0.7}')
    record(bundle, other)
    knn.write_text(json.dumps(told | {"accuracy": {"20": 0.6}}))
    record(bundle, knn)
    measured = {"cifar10-knn": told | {"accuracy": {"20": 0.6}}, "linear": {"accuracy": 0.7}}
    assert load_manifest(bundle) == signed.model_copy(update={"measured": measured})
    after = content(bundle)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["encoder.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"encoder": {"name": "big", "sha256": "' + "f" * 64 + '"}}', "its encoder is 'big' of sha256 ffff"),
        ("[1]", "holds no JSON object"),
        ("{", "not JSON"),
        (None, "no such file"),
    ],
)
def test_what_is_no_measurement_of_this_bundle(
    tmp_path: Path, signed: Manifest, text: str | None, message: str
) -> None:
    bundle = tmp_path / "repository" / "tiny"
    publish(bundle, signed, MODEL)
    before = content(bundle)
    path = tmp_path / "knn.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        record(bundle, path)
    assert content(bundle) == before


def test_only_a_good_bundle_is_measured(tmp_path: Path, signed: Manifest) -> None:
    path = tmp_path / "knn.json"
    path.write_text("{}")
    with pytest.raises(InvalidRequest, match="no such bundle"):
        record(tmp_path / "absent", path)
    publish(tmp_path / "tiny", signed, MODEL)
    (tmp_path / "tiny" / "1" / "model.onnx").write_bytes(b"tampered with")
    with pytest.raises(BundleError, match="the file was changed"):
        record(tmp_path / "tiny", path)
