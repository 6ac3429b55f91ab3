"""Debian's packages for tests that need them."""

import os
import shutil
import subprocess
from collections.abc import Mapping


def install(packages: Mapping[str, str]) -> None:
    """packages: by the command that each brings; those whose command is missing. The services that they would start are
    not wanted."""
    missing = [package for command, package in packages.items() if shutil.which(command) is None]
    if missing:
        here = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        line = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing]
        subprocess.run(line, check=True, env=here, stdout=subprocess.DEVNULL)
