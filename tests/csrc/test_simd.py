"""The errors of exp2 and log2 of the CPU's kernels are below the bounds in csrc/cpu/simd.h, on all instruction sets."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "simd_test.cpp"
CSRC = Path(__file__).parents[2] / "csrc"
AVX2 = ["-mavx2", "-mfma", "-ffp-contract=fast"]
FLAGS = {"baseline": [], "avx2": AVX2, "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]}


@pytest.mark.parametrize("isa", FLAGS)
def test_errors_are_below_the_stated_bounds(isa, tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "simd_test"
    command = [compiler, "-std=c++20", "-O2", "-Wno-psabi", *FLAGS[isa], f"-I{CSRC}", SOURCE, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and isa != "baseline" and "unrecognized" in built.stderr:
        pytest.skip(f"this compiler does not know {isa}")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == 77:
        pytest.skip(f"this processor does not run {isa}")
    exp2_error, exp2_bound, log2_error, log2_bound, special_values = map(float, done.stdout.split())
    assert 0 < exp2_error < exp2_bound
    assert 0 < log2_error < log2_bound
    assert special_values == 1
