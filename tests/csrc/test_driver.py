"""The kernels without torch, under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    cmake = shutil.which("cmake", path=f"{os.path.dirname(os.sys.executable)}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("cmake is not installed")
    build = tmp_path_factory.mktemp("driver")
    options = ["-DEMPCAUSE_BUILD_MODULE=OFF", "-DEMPCAUSE_BUILD_DRIVER=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *options], check=True, capture_output=True)
    subprocess.run([cmake, "--build", str(build), "--target", "driver"], check=True, capture_output=True)
    return build / "driver"


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_clean_under_sanitizers(driver, isa):
    environment = os.environ | {"EMPCAUSE_CPU_ISA": isa}
    done = subprocess.run([driver], env=environment, capture_output=True, text=True, check=False)
    if "does not run" in done.stderr or "expected one of" in done.stderr:
        pytest.skip(f"this processor does not run {isa}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(f"ok   {isa}") == 7
