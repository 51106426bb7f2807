"""The kernels without torch on random problems, under sanitizers, on every instruction set: csrc/driver.cpp."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def build_driver(
    source: Path, folder: Path, build_type: str, sanitizers: str = "address,undefined", stand_in: bool = False
) -> Path:
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("cmake is not installed")
    options = ["-DEMPCAUSE_BUILD_MODULE=OFF", "-DEMPCAUSE_BUILD_DRIVER=ON", f"-DCMAKE_BUILD_TYPE={build_type}"]
    options += [f"-DEMPCAUSE_SANITIZERS={sanitizers}", f"-DEMPCAUSE_BF16_STAND_IN={'ON' if stand_in else 'OFF'}"]
    subprocess.run([cmake, "-S", source, "-B", folder, *options], check=True, capture_output=True)
    subprocess.run([cmake, "--build", folder, "--target", "driver", "--parallel", "2"], check=True, capture_output=True)
    return folder / "driver"


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    def driver(sanitizers: str, stand_in: bool = False) -> Path:
        return build_driver(ROOT, tmp_path_factory.mktemp("driver"), "RelWithDebInfo", sanitizers, stand_in)

    return cache(driver)


def run(driver: Path, isa: str, cases: int) -> None:
    environment = os.environ | {"EMPCAUSE_CPU_ISA": isa}
    done = subprocess.run([driver, str(cases)], env=environment, capture_output=True, text=True, check=False)
    if "does not run" in done.stderr or "expected one of" in done.stderr:
        pytest.skip(f"this processor does not run {isa}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{cases} cases" in done.stdout


@pytest.mark.parametrize(
    ("isa", "cases"), [("baseline", 2000), ("avx2", 4000), ("avx512", 4000), ("avx512_bf16", 4000), ("", 10000)]
)
def test_right_and_clean_under_address_and_undefined_behaviour_sanitizers(build, isa, cases):
    """The empty name is the best instruction set of this processor."""
    run(build("address,undefined"), isa, cases)


def test_pairs_of_bf16_with_their_product_in_software(build):
    """What the kernels for AVX512-BF16 do with pairs, on a processor without it."""
    run(build("address,undefined", stand_in=True), "avx512_bf16", 4000)


def test_clean_under_thread_sanitizer(build):
    """The kernels' own sharing, with threads of the standard library: torch's pool and OpenMP are not instrumented."""
    run(build("thread"), "", 1000)


def test_a_wrong_kernel_is_noticed(build, tmp_path):
    """The driver's own judgement: the same problems with a kernel that forgets the weights of one tile."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    tile = source / "csrc" / "cpu" / "tile.h"
    text = tile.read_text()
    assert text.count("weight[count++] = weights[first + j];") == 1
    tile.write_text(text.replace("weight[count++] = weights[first + j];", "weight[count++] = 1.0f;"))
    driver = build_driver(source, tmp_path / "build", "Debug")
    done = subprocess.run([driver, "50"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is wrong" in done.stdout
