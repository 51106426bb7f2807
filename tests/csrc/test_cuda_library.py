"""The CUDA library loads wherever torch does: with a torch for the CPU, and where torch keeps libtorch_cuda.so to itself.

Neither needs a GPU, nvcc or libcuda: the binding `csrc/torch/cuda.cpp` is compiled as it is, with stand-ins for the kernels and
for libtorch_cuda.so (stub_kernels.cpp, stub_cuda.cpp).
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csrc.building import ROOT
from empcause.ops import backends

TORCH = Path(torch.__file__).parent
HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a libtorch_cuda.so of its own"),
    pytest.mark.skipif(sys.platform != "linux" or shutil.which("c++") is None, reason="needs Linux and a C++ compiler"),
]


def compile_library(library, sources, *options):
    includes = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}", f"-I{ROOT / 'csrc'}"]
    linked = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl", "-Wl,--no-undefined"]
    command = ["c++", "-std=c++20", "-shared", "-fPIC", *options, *includes, *map(str, sources), *linked, "-o", library]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="module")
def cuda_library(tmp_path_factory):
    stable = ("-DTORCH_TARGET_VERSION=0x020a000000000000", "-fvisibility=hidden")
    sources = [ROOT / "csrc/torch/cuda.cpp", HERE / "stub_kernels.cpp"]
    return compile_library(tmp_path_factory.mktemp("cuda") / "libempcause_cuda.so", sources, *stable)


@pytest.fixture(scope="module")
def libtorch_cuda(tmp_path_factory):
    library = tmp_path_factory.mktemp("torch") / "libtorch_cuda.so"
    return compile_library(library, [HERE / "stub_cuda.cpp"], "-Wl,-soname,libtorch_cuda.so")


def run(program, *arguments):
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_it_loads_with_a_torch_for_the_cpu(cuda_library):
    program = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.empcause_cuda.attention.default)"
    assert run(program, cuda_library) == ["empcause_cuda.attention.default"]


def test_it_finds_the_stream_in_a_libtorch_cuda_of_local_visibility(cuda_library, libtorch_cuda):
    """The stub's streams have the number 1000 plus the device's, and its kernels write it into the output."""
    program = """
import ctypes, os, sys
for library in sys.argv[2:]:  # before torch, which asks once whether there is CUDA
    ctypes.CDLL(library, mode=os.RTLD_LOCAL | os.RTLD_NOW)
import torch
torch.ops.load_library(sys.argv[1])
query = torch.ops.stub_cuda.zeros([1, 1, 2, 8])
none = [None] * 4
options = dict(causal=True, scale=0.3, dropout_p=0.0, seed=None, query_offset=None, for_backward=False)
output, *_ = torch.ops.empcause_cuda.attention(query, query, query, None, 1.0, *none, 0, 0, **options)
print(torch.ops.stub_cuda.first(output))
"""
    torch_libraries = [TORCH / "lib" / name for name in ("libc10.so", "libtorch_cpu.so")]
    assert run(program, cuda_library, *torch_libraries, libtorch_cuda) == ["1000.0"]


def test_one_that_does_not_load_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_CUDA_LIBRARY", tmp_path / "libempcause_cuda.so")
    assert "has no CUDA library; build it from the sources" in backends.BACKENDS["cuda"].load()
    (tmp_path / "libempcause_cuda.so").write_text("no library")
    reason = backends.BACKENDS["cuda"].load()
    assert "libempcause_cuda.so cannot be loaded" in reason
    assert "invalid ELF header" in reason or "file too short" in reason
    assert "EMPCAUSE_CUDA=ON" in reason


def needed_symbols(library):
    """The functions of torch that a library takes from elsewhere, by name."""
    listed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}
    return {name for name in names if name.startswith(("aoti_torch_", "torch_")) or "c10" in name or "2at" in name}


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_libraries_need_only_what_torch_2_10_exports(cuda_library):
    """torch_2_10_symbols.txt has every aoti_torch_ and torch_ function that libtorch_cpu.so of torch 2.10.0 exports."""
    known = set((HERE / "torch_2_10_symbols.txt").read_text().split())
    module = importlib.util.find_spec("empcause._C").origin
    for library in (module, cuda_library):
        needed = needed_symbols(library)
        assert "aoti_torch_get_sizes" in needed
        assert needed <= known, sorted(needed - known)
    assert "aoti_torch_get_current_cuda_stream" not in needed_symbols(cuda_library)
