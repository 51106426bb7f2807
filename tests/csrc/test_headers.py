"""Every header of csrc compiles alone, with nothing defined or included before it, as an editor parses it."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from csrc.building import ROOT

HEADERS = [path.relative_to(ROOT) for path in sorted((ROOT / "csrc").rglob("*.h"))]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
ONLY_FOR_A_GPU = Path("csrc/cuda/gpu.h")  # the other headers of cuda/ include the emulator's functions through device.h


def torch_headers() -> Path | None:
    """Return the folder of the headers of the installed torch."""
    torch = importlib.util.find_spec("torch")
    return Path(torch.submodule_search_locations[0]) / "include" if torch else None


def parse(compiler: list[str], header: Path, folder: Path) -> str:
    """Return the messages of a compiler about a file that only includes a header, or the empty string."""
    unit = folder / "unit.cpp"
    unit.write_text(f'#include "{header}"\n')
    done = subprocess.run([*compiler, unit], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode != 0) == bool(done.stderr), done.stderr
    return done.stderr


def cpp() -> list[str]:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    return [compiler, "-std=c++20", "-fvisibility=hidden", "-fsyntax-only", *WARNINGS]


@pytest.mark.parametrize("header", [path for path in HEADERS if path != ONLY_FOR_A_GPU], ids=str)
def test_header_parses_alone(header, tmp_path):
    command = cpp()
    if "torch/csrc/" in (ROOT / header).read_text() or header.parent.name == "torch":
        if torch_headers() is None:
            pytest.skip("torch is not installed")
        command += ["-isystem", str(torch_headers())]
    assert parse(command, ROOT / header, tmp_path) == ""


def test_header_for_a_gpu_parses_alone(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    command = [nvcc, "-x", "cu", "-std=c++20", "-arch=sm_80", "-Werror", "all-warnings"]
    files = ["-cubin", "-o", str(tmp_path / "unit.cubin")]
    assert parse([*command, *files], ROOT / ONLY_FOR_A_GPU, tmp_path) == ""


@pytest.mark.parametrize(
    ("name", "left_out", "complaint"),
    [
        ("cpu/dropout.h", "../attention.h", "Attention"),
        ("cpu/dropout.h", "simd.h", "Vec"),
        ("cpu/decode.h", "kernels.h", "thread_scratch"),
        ("cuda/tile.h", "../attention.h", "Matrices"),
    ],
)
def test_a_missing_include_is_noticed(name, left_out, complaint, tmp_path):
    """A header fails to compile alone if one of its includes is missing."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc" / name
    text = header.read_text()
    line = f'#include "{left_out}"\n'
    assert text.count(line) == 1
    header.write_text(text.replace(line, ""))
    assert complaint in parse(cpp(), header, tmp_path)
