"""Builds targets of CMakeLists.txt for tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(target: str, folder: Path, *options: str, source: Path = ROOT) -> None:
    """Build one target of the project in a folder; skip the test if a tool is missing."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for tool in ("cmake", "ninja", os.environ.get("CXX", "c++")):
        if shutil.which(tool, path=environment["PATH"]) is None:
            pytest.skip(f"{tool} is not installed: it builds {target}")
    configure = ["-G", "Ninja", "-S", source, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *options]
    for command in (configure, ["--build", folder, "--target", target]):
        done = subprocess.run(["cmake", *command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
