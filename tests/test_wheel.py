"""Wheels in fresh environments without nvcc: one built from the sdist, and one with the CUDA kernels (`make wheel`)."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
WITHOUT_NVCC = os.pathsep.join(folder for folder in TOOLS.split(os.pathsep) if not (Path(folder) / "nvcc").exists())
MEGABYTES = 20
SYSTEM_LIBRARIES = re.compile(r"ld-linux.*|lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so\..*")


def call(*command: str | Path, path: str, **options) -> str:
    """Runs a program with this PATH and returns what it prints. If it fails, the test does, with what it says."""
    environment = os.environ | {"PATH": path} | options.pop("env", {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build_from_sdist(folder: Path) -> Path:
    """Builds an sdist, and a wheel from it as any user does."""
    make_sdist = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    call(sys.executable, "-c", make_sdist, folder, path=WITHOUT_NVCC, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    build = ["wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, sdist]
    call(sys.executable, "-m", "pip", *build, path=WITHOUT_NVCC)
    (wheel,) = folder.glob("*.whl")
    return wheel


def build_with_cuda(folder: Path) -> Path:
    """Builds a wheel as `make wheel` does, but for sm_80 alone, which takes a fifth of the time."""
    for tool in ("nvcc", "make", "auditwheel", "patchelf"):
        if shutil.which(tool, path=TOOLS) is None:
            pytest.skip(f"{tool} is not installed: it builds the wheel with the CUDA kernels")
    environment = {"CUDAARCHS": "80"}
    if shutil.which("ccache"):
        environment |= {f"CMAKE_{language}_COMPILER_LAUNCHER": "ccache" for language in ("CXX", "CUDA")}
    # -o: make does not set up .venv; the programs are those of this environment.
    command = ["make", "-o", ".venv/.ready", "wheel", f"BIN={Path(sys.executable).parent}", f"WHEELS={folder}"]
    printed = call(*command, path=TOOLS, cwd=ROOT, env=environment)
    (wheel,) = folder.glob("*.whl")
    assert f"{wheel.stat().st_size} {wheel}" in printed
    return wheel


@dataclass
class Environment:
    """A virtual environment in which a wheel is installed. It finds all other packages in the one that runs the tests."""

    wheel: Path
    folder: Path

    @property
    def package(self) -> Path:
        (package,) = self.folder.glob("lib/python*/site-packages/empcause")
        return package

    def run(self, program: str, *arguments: str) -> str:
        """Runs one of its programs in a folder that has no package, and returns what it prints."""
        return call(self.folder / "bin" / program, *arguments, path=WITHOUT_NVCC, cwd=self.folder)


@pytest.fixture(scope="module", params=[build_from_sdist, build_with_cuda])
def environment(request, tmp_path_factory):
    wheel = request.param(tmp_path_factory.mktemp("wheel"))
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    call(*pip, "install", "--no-deps", "--no-index", wheel, path=WITHOUT_NVCC)
    environment = Environment(wheel, folder)
    # Python reads no further .pth file there, so that the editable install of the other environment is not found.
    others = environment.package.parent / "others.pth"
    others.write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return environment


def has_cuda(environment: Environment) -> bool:
    return (environment.package / "libempcause_cuda.so").exists()


def test_the_package_works(environment):
    assert (environment.package / "kernels").is_dir()
    code = """
import torch
import empcause
from empcause.data import load_dialogues
assert len(load_dialogues("train", "sample")) >= 192
query = torch.randn(1, 2, 5, 8)
cause = torch.rand(1, 5)
outputs = [empcause.biased_attention(query, query, query, cause, backend=name) for name in ("cpu", "reference")]
torch.testing.assert_close(*outputs)
print(empcause.__file__)
"""
    assert environment.run("python", "-c", code).strip() == str(environment.package / "__init__.py")


def test_info_answers(environment):
    lines = {line.split()[0]: line for line in environment.run("empcause", "info").splitlines()}
    assert "runs here" in lines["cpu"]
    if not has_cuda(environment):
        assert re.match(
            "  cuda +not built +this installation has no CUDA library; build it from the sources", lines["cuda"]
        )
    elif torch.cuda.is_available():
        assert "runs here" in lines["cuda"]
    else:
        assert re.fullmatch("  cuda +built, does not run here +torch sees no CUDA device", lines["cuda"])


def test_the_compiled_module_can_be_imported_before_torch(environment):
    """No torch lies beside it, so that it needs the libraries of the one that this environment imports."""
    code = "from empcause import _C; import torch; print(torch.ops.empcause_cpu.attention)"
    assert environment.run("python", "-c", code).strip() == "empcause_cpu.attention"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_libraries_need_torch_and_the_system_alone(environment):
    """Neither libcuda nor a library of the CUDA toolkit is needed, and no path leads to the torch of the build."""
    libraries = list(environment.package.rglob("*.so"))
    assert len(libraries) == 1 + has_cuda(environment)
    for library in libraries:
        section = call("readelf", "--dynamic", "--wide", library, path=WITHOUT_NVCC)
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", section)
        assert "libtorch_cpu.so" in needed
        assert [name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name)] == ["libtorch_cpu.so"]
        assert not re.search(r"\((RPATH|RUNPATH)\)", section), section


def test_the_wheel_with_cuda_is_small_and_says_where_it_runs(environment):
    if not has_cuda(environment):
        pytest.skip("made for this machine alone")
    assert environment.wheel.stat().st_size < MEGABYTES * 10**6
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", environment.wheel.name)


def test_every_module_can_be_imported(environment):
    for optional in ("triton", "matplotlib", "bert_score"):
        pytest.importorskip(optional)
    files = sorted(environment.package.rglob("*.py"))
    # A __main__ is a command: imported, it would run.
    modules = [
        ".".join(path.relative_to(environment.package.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in files
        if path.name != "__main__.py"
    ]
    assert {"empcause.testing", "empcause.kernels.operators", "empcause.benchmarks.gpu"} <= {*modules}
    assert not [name for name in modules if name.split(".")[-1].startswith("test_")]
    code = f"import importlib\nfor name in {modules!r}: print(importlib.import_module(name).__file__)"
    assert environment.run("python", "-c", code).split("\n")[:-1] == [
        str(path) for path in files if path.name != "__main__.py"
    ]
