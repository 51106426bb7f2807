"""The bindings compile against the headers of every minor version of torch from 2.10 to the newest (`make abi`).

Headers suffice, so wheels for macOS are downloaded, which have them and are small. They are kept in build/torch_headers.
"""

import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pybind11
import pytest
import torch

from csrc.building import ROOT

OLDEST = 10  # minor version of torch 2; pyproject.toml, CMakeLists.txt and torch_2_10_symbols.txt name it too
INSTALLED = int(torch.__version__.split(".")[1])
PLATFORMS = ("macosx_11_0_arm64", "macosx_14_0_arm64")


def headers(minor):
    """The folder of the headers of torch 2.`minor`; None if it is newer than the installed one and pip does not find it."""
    folder = ROOT / "build" / "torch_headers" / f"2.{minor}"
    if not folder.exists():
        download = folder.with_suffix(".download")
        where = [word for platform in PLATFORMS for word in ("--platform", platform)]
        options = ["--no-deps", "--only-binary=:all:", *where, "--python-version", "3.12", "--dest", download]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, f"torch==2.{minor}.*"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            assert minor > INSTALLED, done.stderr
            print(f"pip finds no torch 2.{minor}: {done.stderr.strip().splitlines()[-1]}")
            return None
        (wheel,) = download.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(download, [name for name in archive.namelist() if name.startswith("torch/include/")])
        wheel.unlink()
        download.rename(folder)
    return folder / "torch" / "include"


@pytest.mark.abi
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_bindings_compile_against_every_torch():
    failed, minor = {}, OLDEST
    while (include := headers(minor)) is not None:
        for source in ("cpu.cpp", "cuda.cpp", "module.cpp"):
            defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", '-DEMPCAUSE_TORCH_TARGET="2.10"']
            python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
            command = ["c++", "-std=c++20", "-fsyntax-only", *defines, *python, "-isystem", include]
            done = subprocess.run(
                [*command, ROOT / "csrc" / "torch" / source], capture_output=True, text=True, check=False
            )
            if done.returncode:
                failed[f"torch 2.{minor}, {source}"] = done.stderr[:1000]
        minor += 1
    assert not failed, failed
    print(f"Compiled against torch 2.{OLDEST} to 2.{minor - 1}.")
