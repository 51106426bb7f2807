"""`empcause bench` as it is installed: with the files that a wheel has, away from the source tree, without a network."""

import os
import shutil
import site
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import empcause._C

ROOT = Path(__file__).parents[2]
PROGRAM = """
import math
import socket
def refuse(*_): raise OSError("there is no network")
socket.socket.connect = refuse
if __name__ == "__main__":
    import empcause.benchmarks.gpu, empcause.cli
    from empcause.benchmarks.workers import run_all
    assert empcause.benchmarks.gpu.__file__.startswith(SITE)
    arguments = "--device cpu --suites overhead --dtypes fp32 --seconds 0 --output results"
    assert empcause.cli.main(["bench", *arguments.split()]) == 0
    assert run_all([(math.sqrt, (4.0,))], 600.0) == [2.0]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the packages that a wheel would have, by pyproject.toml, and the compiled module."""
    folder = tmp_path_factory.mktemp("site")
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]
    for name, source in wheel["packages"].items():
        shutil.copytree(ROOT / source, folder / name, dirs_exist_ok=True)
    for pattern in wheel["exclude"]:
        for path in folder.glob(pattern.removesuffix("/**")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copy(empcause._C.__file__, folder / "empcause")
    return folder


def test_it_runs_away_from_the_sources_and_without_a_network(installed, tmp_path):
    (tmp_path / "program.py").write_text(f"SITE = {str(installed)!r}\n{PROGRAM}")
    path = os.pathsep.join([str(installed), *site.getsitepackages()])
    # -S: without the site module, the editable install of this environment is not found.
    command = [sys.executable, "-S", "program.py"]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "cpu.csv").exists()
    assert not list((installed / "empcause" / "benchmarks").glob("test_*")), "no wheel has them"
