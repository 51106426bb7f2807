"""Runs driver.cpp, the CPU's kernels without torch on random problems, under sanitizers, on every instruction set."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from csrc.building import ROOT, build

pytestmark = pytest.mark.slow


def build_driver(folder: Path, *options: str, source: Path = ROOT) -> Path:
    build("driver", folder, "-DEMPCAUSE_BUILD_MODULE=OFF", "-DEMPCAUSE_BUILD_DRIVER=ON", *options, source=source)
    return folder / "driver"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A function that builds the driver with options, once for all tests."""

    def built(*options: str) -> Path:
        return build_driver(tmp_path_factory.mktemp("driver"), "-DCMAKE_BUILD_TYPE=RelWithDebInfo", *options)

    return cache(built)


def run(driver: Path, isa: str, cases: int) -> None:
    environment = os.environ | {"EMPCAUSE_CPU_ISA": isa}
    done = subprocess.run([driver, str(cases)], env=environment, capture_output=True, text=True, check=False)
    if "this processor runs" in done.stderr:
        pytest.skip(f"this processor does not run {isa}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{cases} cases" in done.stdout


@pytest.mark.parametrize(
    ("isa", "cases"), [("baseline", 2000), ("avx2", 4000), ("avx512", 4000), ("avx512_bf16", 4000), ("", 10000)]
)
def test_right_and_clean_under_address_and_undefined_behaviour_sanitizers(driver, isa, cases):
    """With the empty name, the driver runs the fastest instruction set of this processor."""
    run(driver(), isa, cases)


def test_products_of_bf16_in_software(driver):
    """The kernels for AVX512-BF16 are right, shown on any processor: their products are computed in software."""
    run(driver("-DEMPCAUSE_BF16_STAND_IN=ON"), "avx512_bf16", 4000)


def test_clean_under_thread_sanitizer(driver):
    """Threads of the standard library run the kernels: the sanitizer does not instrument OpenMP, which torch uses."""
    run(driver("-DEMPCAUSE_SANITIZERS=thread"), "", 1000)


def test_a_wrong_kernel_is_noticed(tmp_path):
    """The driver fails if a kernel leaves out the weights of a tile from which some keys are removed."""
    source = tmp_path / "source"
    for folder in ("csrc", "tests/csrc"):
        shutil.copytree(ROOT / folder, source / folder)
    shutil.copy(ROOT / "CMakeLists.txt", source)
    tile = source / "csrc" / "cpu" / "tile.h"
    text = tile.read_text()
    right, forgetful = (
        "j < count ? weights[first + place[j]] : 0.0f",
        "all ? weights[first + j] : j < count ? 1.0f : 0.0f",
    )
    assert text.count(right) == 1
    tile.write_text(text.replace(right, forgetful))
    wrong = build_driver(tmp_path / "build", "-DCMAKE_BUILD_TYPE=Debug", source=source)
    done = subprocess.run([wrong, "50"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is wrong" in done.stdout
