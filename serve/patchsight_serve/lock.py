"""A lock that goes with its process, whatever ends that: what nobody has locked, a process left behind."""

import fcntl
import os
from pathlib import Path


def locked(path: Path) -> int | None:
    """Lock a file or a folder that is there: its descriptor, to be closed, which holds the lock. None where another
    process does, or where it is gone or not ours to open. It holds between containers that share the files, too."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
