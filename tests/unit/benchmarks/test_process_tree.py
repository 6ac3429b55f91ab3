"""CPU time and memory of a process with a child that does the work."""

import subprocess
import sys
from collections.abc import Iterator

import process_tree
import pytest

SPIN = """
import time
while time.process_time() < 0.4:
    pass
data = bytearray(60_000_000)
print("done", flush=True)
input()
"""
PARENT = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {SPIN!r}])"


@pytest.fixture
def tree() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        yield process
        process_tree.end(process.pid, patience_s=0.3)


def test_the_childs_work_and_memory_are_the_trees(tree: "subprocess.Popen[bytes]") -> None:
    assert len(process_tree.descendants(tree.pid)) == 2
    assert process_tree.cpu_seconds(tree.pid) >= 0.38
    assert process_tree.memory_mb(tree.pid) > 55
    with process_tree.MemoryPeak(tree.pid) as peak:
        pass
    assert peak.mb > 55


def test_all_of_the_tree_is_ended(tree: "subprocess.Popen[bytes]") -> None:
    process_tree.end(tree.pid, patience_s=0.3)
    assert len(process_tree.descendants(tree.pid)) == 1  # nothing below it; itself waits for us
    tree.wait(5)
