"""Tests of the emulator that runs CUDA kernels on the host: its primitives are right, and each of its checks fires."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "emulator_test.cpp"
CUDA = Path(__file__).parents[2] / "csrc" / "cuda"

RIGHT = [
    "indices",
    "barriers",
    "warps",
    "sizes",
    "shuffles",
    "votes",
    "copies",
    "load_matrices",
    "load_matrices_transposed",
    "mma of bf16",
    "mma of fp16",
    "rounding to bf16",
    "rounding to fp16",
    "arithmetic",
    "after a failure",
    "empty grid",
]
OUTSIDE = "bytes of global memory outside of the arguments"
UNALIGNED = "bytes of global memory that are not aligned to their number"
UNDER_WAY = "to which an asynchronous copy is under way"
# The expected error of every toy that breaks a rule.
BROKEN = {
    "ReadAfterWrite": "race: reads byte 0 of shared memory, which thread 0 wrote with no barrier between",
    "ReadAfterWrite with sync_warp": "race: reads byte 124 of shared memory, which thread 31 wrote with no barrier",
    "ReadAfterWriteInWarp": "race: reads byte 0 of shared memory, which thread 0 wrote with no barrier between",
    "WriteAfterRead": "race: writes byte 124 of shared memory, which thread 63 read with no barrier between",
    "WriteAfterReads": "race: writes byte 0 of shared memory, which thread 1 read with no barrier between",
    "WriteAfterWrite": "race: writes byte 0 of shared memory, which thread 0 wrote with no barrier between",
    "Unwritten": "reads byte 68 of shared memory, which nobody wrote.* thread 17",
    "UnwrittenByThisBlock": "reads byte 124 of shared memory, which nobody wrote.* block 40 0 0",
    "UnwrittenMatrix": "reads byte 80 of shared memory, which nobody wrote.* thread 5",
    "HalfWritten": "reads byte 2 of shared memory, which nobody wrote",
    "SharedTooFar": "writes 4 bytes at byte 128 of shared memory, of which the block has 128.* thread 31",
    "SharedTooLarge": "a block has at most 101376 bytes of shared memory, not 102400",
    "SharedMisaligned": "writes 4 bytes at byte 2 of shared memory, which is not a multiple of their number",
    "MatrixMisaligned": "reads 16 bytes at byte 8 of shared memory, which is not a multiple of their number",
    "CopyMisaligned": "copies to 16 bytes at byte 8 of shared memory, which is not a multiple of their number",
    "CopyFromMisaligned": f"touches 16 {UNALIGNED}",
    "CopyFromOutside": f"touches 16 {OUTSIDE}",
    "GlobalReadOutside": f"touches 4 {OUTSIDE}",
    "GlobalReadBefore": f"touches 4 {OUTSIDE}",
    "GlobalWriteOutside": f"touches 4 {OUTSIDE}",
    "GlobalMisaligned": f"touches 8 {UNALIGNED}",
    "CopyNotWaitedFor": f"reads byte 124 of shared memory, {UNDER_WAY}",
    "CopyNotCommitted": f"reads byte 124 of shared memory, {UNDER_WAY}",
    "CopyWithoutBarrier": "race: reads byte 4 of shared memory, which thread 0 wrote with no barrier between",
    "CopyOverReaders": "race: writes byte 0 of shared memory, which thread 63 read with no barrier between",
    "StoreUnderCopy": f"writes byte 4 of shared memory, {UNDER_WAY}.* thread 40",
    "StoreUnderOwnCopy": f"writes byte 4 of shared memory, {UNDER_WAY}.* thread 0",
    "TwoCopies": f"writes byte 0 of shared memory, {UNDER_WAY}.* thread 40",
    "ExitsBeforeBarrier": "waits in sync_block, which not all threads of the block reach",
    "ExitsBeforeShuffle": "waits in shuffle, which not all lanes of the warp reach",
    "ShuffleInBranch": "waits in shuffle, which not all lanes of the warp reach",
    "VoteInBranch": "waits in any_lane, which not all lanes of the warp reach",
    "CountInBranch": "waits in sync_block, which not all threads of the block reach",
    "ProductInBranch": "waits in mma, which not all lanes of the warp reach.* thread 4",
    "BarrierAgainstShuffle": r"shuffle while others are in sync_warp at emulator_test.cpp:\d+",
    "BarrierInBranch": "waits in sync_block, which not all threads of the block reach",
    "TwoShuffles": r"shuffle while others are in shuffle at emulator_test.cpp:\d+",
    "Asserts": "the assertion's own words.* block 2 0 0, thread 33",
}


@pytest.fixture(scope="session")
def emulator_test(tmp_path_factory):
    """A function that runs the test program with some arguments and returns what it prints."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("emulator") / "emulator_test"
    sources = [SOURCE, *(CUDA / "emulator").glob("*.cpp")]
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]
    command = [compiler, "-std=c++20", "-O1", *warnings, f"-I{CUDA}", "-pthread"]
    done = subprocess.run([*command, *sources, "-o", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return lambda *arguments: subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_every_toy_is_expected(emulator_test):
    assert set(emulator_test().splitlines()) == {f"right: {name}" for name in RIGHT} | BROKEN.keys()


@pytest.mark.parametrize("name", RIGHT)
def test_primitives(emulator_test, name):
    """The toy's results are right, and the emulator reports no error."""
    assert emulator_test(f"right: {name}") == "fine"


@pytest.mark.parametrize("name", BROKEN)
def test_every_check_fires(emulator_test, name):
    """The error names a line of the toy's source, the kernel, the block and the thread."""
    message = emulator_test(name)
    assert re.match(BROKEN[name], message)
    if name != "SharedTooLarge":  # refused before any thread runs
        kernel = name.split()[0].replace("StoreUnderOwnCopy", "StoreUnderCopy")
        place = rf"at emulator_test\.cpp:(\d+) \(.*::{kernel}\b.*, block \d+ 0 0, thread \d+\)$"
        line = int(re.search(place, message)[1])
        before = "\n".join(SOURCE.read_text().splitlines()[:line])
        assert re.findall(r"^struct (\w+) : Toy", before, re.MULTILINE)[-1] == kernel


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_both_sides_of_the_interface(architecture, tmp_path):
    """nvcc compiles the toys with the functions of gpu.h to the intended instructions."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    command = [nvcc, "-x", "cu", "-std=c++20", "-O1", f"-arch={architecture}", f"-I{CUDA}", "-Werror", "all-warnings"]
    files = ["-cubin", "-o", tmp_path / "toys.cubin", "--keep", "--keep-dir", tmp_path, SOURCE]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    instructions = (tmp_path / "emulator_test.ptx").read_text()
    for instruction in (
        "bar.sync",
        "bar.warp.sync",
        "shfl.sync.idx.b32",
        "shfl.sync.bfly.b32",
        "cp.async.cg.shared.global",
        "cp.async.wait_group 1",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "cvt.rn.bf16x2.f32",
        "cvt.rn.f16x2.f32",
        "ex2.approx.ftz.f32",
        "lg2.approx.ftz.f32",
        "ld.shared.v",
        "st.shared.v",
        "ld.global.v",
        "__assertfail",
    ):
        assert instruction in instructions, instruction
    generic = r"\b(?:ld|st)\.(?:v\d\.)?[bfsu]\d"
    assert not re.search(generic, instructions), "an access that does not know its memory"
