"""Tests the kernels for AVX512-BF16 on processors without it, built with their products of bf16 in software."""

import os
import platform
import subprocess
import sys

import pytest

from csrc.building import ROOT, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a unit for x86"),
]

# Runs pytest with the module whose path is the first argument in place of the installed one.
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
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=False
    )
    if pybind11.returncode:
        pytest.skip("pybind11 is needed to build the module")
    build("_C", tmp_path, "-DEMPCAUSE_BF16_STAND_IN=ON", f"-Dpybind11_DIR={pybind11.stdout.strip()}")
    (module,) = tmp_path.glob("_C*.so")
    environment = os.environ | {"EMPCAUSE_CPU_ISA": "avx512_bf16"}
    tests = [str(ROOT / "tests" / "ops" / "test_cpu.py"), "-q", "-k", "not instruction_set"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(module), *tests], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
