"""Files on their way: gone at the end of their block, of their process, or at the next start after a kill."""

import errno
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from patchsight_serve.errors import StorageFull
from patchsight_serve.scratch import Scratch, told

LEAVES_A_FILE = """
    import sys
    from pathlib import Path
    from patchsight_serve.scratch import Scratch
    (Scratch(Path(sys.argv[1])).make() / "file").write_bytes(b"x")
    print("made", flush=True)
    sys.stdin.read()
"""


def files(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.rglob("*") if path.is_file())


def test_a_folder_is_gone_after_its_block_and_all_after_the_process(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "s")
    assert not (tmp_path / "s").exists()  # nothing is made before it is needed
    with scratch.folder() as folder:
        (folder / "file").write_bytes(b"x")
        assert files(tmp_path) == ["file"]
    assert files(tmp_path) == []
    (scratch.make() / "file").write_bytes(b"x")
    scratch.clear()
    assert files(tmp_path) == ["file"]  # its own are not left behind
    scratch.close()
    assert list((tmp_path / "s").iterdir()) == []
    (scratch.make() / "file").write_bytes(b"x")  # it begins anew
    scratch.close()


def test_what_a_killed_process_left_is_removed_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(LEAVES_A_FILE), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        scratch = Scratch(tmp_path)
        scratch.clear()
        assert files(tmp_path) == ["file"]
        process.kill()
    assert files(tmp_path) == ["file"]
    scratch.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_other_errors_are_not_hidden() -> None:
    for code in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(StorageFull, match="no space left for the body; nothing of this request"), told("the body"):
            raise OSError(code, "x")
    with pytest.raises(FileNotFoundError), told("the body"):
        raise FileNotFoundError(errno.ENOENT, "x")
    with pytest.raises(StorageFull), told("the body"), Path("/dev/full").open("wb") as file:
        file.write(b"x")
