"""On the disk, and not only on its way there."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have what was written to a file, or which names a folder has, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
