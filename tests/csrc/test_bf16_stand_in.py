"""The operator for AVX512-BF16 on a processor without it: its module built with products of pairs in software, and tested."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a unit for x86"),
]

ROOT = Path(__file__).parents[2]

# The tests of the operator, with the module in the first argument in the place of the installed one.
RUN = """
import importlib.util, sys
import pytest, torch
path, *arguments = sys.argv[1:]
specification = importlib.util.spec_from_file_location("empcause._C", path)
module = sys.modules["empcause._C"] = importlib.util.module_from_spec(specification)
specification.loader.exec_module(module)
assert module.build_info()["isa_selected"] == "avx512_bf16"
sys.exit(pytest.main(arguments))
"""


def test_operator(tmp_path):
    folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "EMPCAUSE_CPU_ISA": "avx512_bf16"}
    if any(shutil.which(tool, path=environment["PATH"]) is None for tool in ("cmake", "ninja")):
        pytest.skip("cmake and ninja are needed to build the module")
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=False
    )
    if pybind11.returncode:
        pytest.skip("pybind11 is needed to build the module")
    options = [
        "-DEMPCAUSE_BF16_STAND_IN=ON",
        f"-Dpybind11_DIR={pybind11.stdout.strip()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    for command in (["-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options], ["--build", tmp_path, "--target", "_C"]):
        built = subprocess.run(["cmake", *command], env=environment, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (module,) = tmp_path.glob("_C*.so")
    tests = [str(ROOT / "tests" / "ops" / "test_cpu.py"), "-q", "-k", "not instruction_set"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(module), *tests], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
