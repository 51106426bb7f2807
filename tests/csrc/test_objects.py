"""The units of the CPU's kernels, one per instruction set, share no code, and the baseline runs on every processor.

Of several copies of an inline function the linker keeps one. If two units, or a unit and the bindings, shared a
function, it might have instructions that the processor does not have. So every function that could be shared must be in
the namespace of its unit's instruction set. The units are compiled without optimisation too: there no function is
inlined, so none is missed.
"""

import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from csrc.building import build

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="several units are for x86 alone")

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
# A pointer that the unwinder uses; it is data, the same in all units.
NO_CODE = {"DW.ref.__gxx_personality_v0"}
# Instructions with a VEX or EVEX prefix, whose names begin with v, registers of 32 and 64 bytes, and mask registers.
AVX = re.compile(r"^v|%[yz]mm\d|%k\d")


def tool(name: str) -> str:
    """Return the path of a program. If it is not installed, skip the test, or fail it in CI."""
    found = shutil.which(name)
    if found is None:
        assert not os.environ.get("CI"), f"{name} is not installed"
        pytest.skip(f"{name} is not installed")
    return found


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def weak_symbols(path: Path) -> set[str]:
    """Return the symbols that an object defines and the linker merges by name (in nm: weak, weak object, unique)."""
    lines = output(tool("nm"), "--defined-only", "--format=posix", path).splitlines()
    return {name for name, kind, *_ in map(str.split, lines) if kind in ("W", "V", "u")} - NO_CODE


def shared_symbols(path: Path, isa: str) -> set[str]:
    """Return the weak symbols of an object that another unit may define too: those outside of its own namespace."""
    namespace = f"8empcause3cpu{len(isa)}{isa}"
    return {name for name in weak_symbols(path) if namespace not in name}


def avx_instructions(path: Path) -> list[str]:
    """Return the instructions of an object that only processors with AVX run."""
    lines = output(tool("objdump"), "-d", "--no-show-raw-insn", path).splitlines()
    instructions = [line.split("\t", 1)[1] for line in lines if re.match(r"\s*[0-9a-f]+:\t", line)]
    assert instructions, f"{path} has no code"
    return [instruction for instruction in instructions if AVX.search(instruction)]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """A function that builds the units and returns the objects of each."""

    def built(build_type: str) -> dict[str, list[Path]]:
        folder = tmp_path_factory.mktemp(build_type)
        for isa in ISAS:
            build(f"kernels_{isa}", folder, "-DEMPCAUSE_BUILD_MODULE=OFF", f"-DCMAKE_BUILD_TYPE={build_type}")
        found = {isa: sorted((folder / "CMakeFiles" / f"kernels_{isa}.dir").rglob("*.o")) for isa in ISAS}
        assert {path.name for paths in found.values() for path in paths} == {"kernels.cpp.o", "limits.cpp.o"}
        return found

    return cache(built)


BUILD_TYPES = ["Debug", pytest.param("Release", marks=pytest.mark.slow)]


@pytest.mark.parametrize("build_type", BUILD_TYPES)
def test_no_two_units_share_code(objects, build_type):
    for isa, paths in objects(build_type).items():
        assert [symbol for path in paths for symbol in shared_symbols(path, isa)] == []
        assert any(map(weak_symbols, paths)), "it has functions of its own"


@pytest.mark.parametrize("build_type", BUILD_TYPES)
def test_the_baseline_runs_on_every_processor(objects, build_type):
    units = objects(build_type)
    assert [instruction for path in units["baseline"] for instruction in avx_instructions(path)] == []
    for isa in ISAS[1:]:
        assert all(map(avx_instructions, units[isa])), "the others' instructions are seen"


INLINE = """
inline int twice(int x) { return 2 * x; }
int (*UNIT)(int) = twice;
"""
LIBRARY = """
#include <vector>
std::vector<float> UNIT(int size) { return std::vector<float>(size); }
"""
OF_ITS_OWN = """
namespace empcause::cpu::UNIT {
inline int twice(int x) { return 2 * x; }
}
int (*pointer)(int) = empcause::cpu::UNIT::twice;
"""
SUM = """
float UNIT(const float* values) {
  float sum = 0;
  for (int i = 0; i < 64; ++i) sum += values[i];
  return sum;
}
"""


def compiled(source: str, unit: str, folder: Path, *flags: str) -> Path:
    path, made = folder / f"{unit}.cpp", folder / f"{unit}.o"
    path.write_text(source)
    compiler = tool(os.environ.get("CXX", "c++"))
    output(compiler, "-std=c++20", f"-DUNIT={unit}", *flags, "-c", path, "-o", made)
    return made


@pytest.mark.parametrize(
    ("source", "shared"),
    [(INLINE, "twice"), (LIBRARY, "vector"), (OF_ITS_OWN, None)],
    ids=["an inline function", "std::vector", "a namespace of its own"],
)
def test_shared_code_is_noticed(source, shared, tmp_path):
    """The test finds a function that two units would share, and accepts one in the unit's namespace."""
    unit = compiled(source, "avx512", tmp_path, "-mavx512f")
    assert weak_symbols(unit)
    found = shared_symbols(unit, "avx512")
    assert (found == set()) if shared is None else any(shared in symbol for symbol in found)
    assert shared_symbols(unit, "avx512_bf16") == weak_symbols(unit), "it is no other's"


@pytest.mark.parametrize("flags", [["-mavx"], ["-mavx2"], ["-mavx512f"], []], ids=str)
def test_avx_is_noticed(flags, tmp_path):
    """The test finds instructions of AVX in an object that was compiled with the wrong flags."""
    assert bool(avx_instructions(compiled(SUM, "baseline", tmp_path, *flags))) == bool(flags)
