"""The registry of backends: which there are, which are built and which run on this machine."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from empcause.ops.registration import OPERATORS, define, find_kernel, register, registered
from empcause.ops.torch_internals import TESTED_TORCH, load_on_first_use
from empcause.text import visible

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUDA_LIBRARY = Path(__file__).parents[1] / "libempcause_cuda.so"
_BUILD_CUDA = (
    "build it from the sources, where nvcc is installed: "
    "pip install --no-build-isolation --config-settings=cmake.define.EMPCAUSE_CUDA=ON ."
)


@dataclass(frozen=True)
class Backend:
    """One implementation of the operator.

    Attributes:
        name: what `backend=` calls it; its raw operators are `torch.ops.empcause_<name>`.
        devices: types of the devices that it is made for; None stands for all.
        dtypes: of query, key and value.
        load: makes its raw operators known to torch; returns None, or why that failed.
        describe: returns whether the loaded backend would run on this machine, and what it takes or why it would not.
    """

    name: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], str | None]
    describe: Callable[[], tuple[bool, str]]


@dataclass(frozen=True)
class BackendInfo:
    """One backend.

    Attributes:
        name: what `backend=` calls it.
        built: whether its operators are known to torch.
        runs: whether it would run on this machine.
        reason: what it takes; or why it is not built or would not run.
    """

    name: str
    built: bool
    runs: bool
    reason: str


@dataclass(frozen=True)
class Info:
    """What `empcause.info()` returns; `str()` of it is a table.

    Attributes:
        version: of empcause.
        torch: version of torch that is installed.
        tested_torch: minor versions of torch ("2.13") with which all tests are run.
        backends: all there are, best first.
    """

    version: str
    torch: str
    tested_torch: tuple[str, ...]
    backends: tuple[BackendInfo, ...]

    @property
    def torch_is_tested(self) -> bool:
        """Whether the tests are run with the installed minor version of torch."""
        return ".".join(self.torch.split(".")[:2]) in self.tested_torch

    def __getitem__(self, name: str) -> BackendInfo:
        """Returns the backend of this name.

        Raises:
            KeyError: there is none.
        """
        return {backend.name: backend for backend in self.backends}[name]

    def __str__(self) -> str:
        tested = f"tested with {', '.join(self.tested_torch)}" + ("" if self.torch_is_tested else ", not with this one")
        lines = [f"empcause {self.version}, torch {self.torch} ({tested})"]
        for backend in self.backends:
            state = "runs here" if backend.runs else "built, does not run here" if backend.built else "not built"
            lines.append(f"  {backend.name:<10} {state:<26} {backend.reason}")
        return "\n".join(lines)


def info() -> Info:
    """Returns which backends are built and which would run here, and whether the installed torch is one that is tested.

    Loads all backends.
    """
    from empcause import __version__

    return Info(__version__, torch.__version__, TESTED_TORCH, tuple(map(_info, BACKENDS.values())))


def _info(backend: Backend) -> BackendInfo:
    why_not = why_not_loaded(backend.name)
    if why_not is not None:
        return BackendInfo(backend.name, False, False, why_not)
    return BackendInfo(backend.name, True, *backend.describe())


def _load_cpu() -> str | None:
    try:
        importlib.import_module("empcause._C")
    except ImportError as error:
        return f"the compiled module is missing or does not fit the installed torch ({error})"
    register("empcause_cpu")
    return None


def _describe_cpu() -> tuple[bool, str]:
    try:
        facts = importlib.import_module("empcause._C").build_info()
    except UnicodeDecodeError:
        return False, "EMPCAUSE_CPU_ISA is not UTF-8 text"
    except RuntimeError as error:
        return False, visible(str(error))
    return True, (
        f"CPU tensors in fp32, bf16, fp16; instruction set {facts['isa_selected']} "
        f"(built: {', '.join(facts['isa_built'])}), {torch.get_num_threads()} threads, {facts['compiler']}, "
        f"for torch {facts['torch_target']} and newer"
    )


def _load_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (pip install "empcause[gpu]")'
    try:
        module = importlib.import_module("empcause.kernels.operators")
    except ImportError as error:
        return f"the installed triton does not fit ({error})"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    define("empcause_triton", module, ["CUDA", "CPU"] if interpreted else ["CUDA"])
    register("empcause_triton")
    return None


def _load_cuda() -> str | None:
    if not _CUDA_LIBRARY.exists():
        return f"this installation has no CUDA library; {_BUILD_CUDA}"
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        return f"{_CUDA_LIBRARY.name} cannot be loaded ({error.__cause__ or error}); {_BUILD_CUDA}"
    register("empcause_cuda")
    return None


def _describe_gpu(name: str, on_cpu: str) -> tuple[bool, str]:
    if _has_kernels(name, "cpu"):
        return True, f"CPU tensors, {on_cpu}: to test and debug the GPU kernels, slow"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    return True, f"CUDA tensors in fp32, bf16, fp16; {torch.cuda.get_device_name()}; {_why_default(name)}"


# By name, best first: tensors go to the first backend that is made for their device, takes their dtype and can be loaded.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("cpu", ("cpu",), _KERNEL_DTYPES, _load_cpu, _describe_cpu),
        Backend(
            "triton",
            ("cuda",),
            _KERNEL_DTYPES,
            _load_triton,
            lambda: _describe_gpu("triton", "in Triton's interpreter"),
        ),
        Backend("cuda", ("cuda",), _KERNEL_DTYPES, _load_cuda, lambda: _describe_gpu("cuda", "under the emulator")),
        Backend(
            "reference",
            None,
            tuple(DTYPES),
            lambda: None,
            lambda: (True, "any device and fp64: the equations in plain torch, quadratic memory"),
        ),
    )
}


# The calls on a GPU for which the CUDA kernels are chosen before Triton's: by compute capability, dtype, and head size as the
# CUDA kernels divide them. Those are in it for which benchmarks/results/gpu.csv has figures of both, and shows the CUDA
# kernels not slower in any case. Nothing else decides, so that the same call has the same bits whatever its length is.
CUDA_IS_NOT_SLOWER: frozenset[tuple[tuple[int, int], torch.dtype, int]] = frozenset()


def head_dim_class(head_dim: int) -> int:
    """Returns the largest head size of the CUDA kernel that serves this head size, which is at most 256."""
    return next(largest for largest in (32, 64, 96, 128, 256) if head_dim <= largest)


@cache
def gpu_default(device: torch.device, dtype: torch.dtype, head_dims: int) -> str | None:
    """Returns "cuda" where the CUDA kernels are measured and can run, else None.

    Args:
        device: a CUDA device.
        dtype: of query, key and value.
        head_dims: of `head_dim_class`.
    """
    if not CUDA_IS_NOT_SLOWER or _why_not(BACKENDS["cuda"], "cuda", dtype) is not None:
        return None
    return "cuda" if (torch.cuda.get_device_capability(device), dtype, head_dims) in CUDA_IS_NOT_SLOWER else None


def _why_default(name: str) -> str:
    """Says for which calls on this machine's GPU a backend is the default, and why."""
    other = {"triton": "cuda", "cuda": "triton"}[name]
    if why_not_loaded(other) is not None:
        return f"the default, as {other} is not there"
    capability = torch.cuda.get_device_capability()
    calls = sorted((DTYPES[dtype], dims) for gpu, dtype, dims in CUDA_IS_NOT_SLOWER if gpu == capability)
    if not calls:
        default = "the default" if name == "triton" else "not the default"
        return f"{default}, as no measurement on such a GPU shows cuda to be as fast as triton"
    named = ", ".join(f"{dtype} with head sizes up to {dims}" for dtype, dims in calls)
    default = "the default but for" if name == "triton" else "the default for"
    return f"{default} {named}, where cuda is measured to be at least as fast as triton"


def load_cuda(path: str | Path) -> None:
    """Load the CUDA backend from a library built elsewhere than beside the package, or built for the host's emulator.

    Args:
        path: `libempcause_cuda.so`, or `libempcause_cuda_emulation.so`, which takes CPU tensors.

    Raises:
        RuntimeError: a CUDA backend is loaded already.
        OSError: the file is missing or does not fit the installed torch.
    """
    if why_not_loaded("cuda") is None:
        raise RuntimeError("The CUDA backend is loaded already.")
    torch.ops.load_library(path)
    why_not_loaded.cache_clear()
    find.cache_clear()
    register("empcause_cuda")


@cache
def why_not_loaded(name: str) -> str | None:
    """Load a backend, once per process. Returns None, or why that failed."""
    return None if f"empcause_{name}" in registered else BACKENDS[name].load()


for _name in BACKENDS.keys() - {"reference"}:  # which has no raw operators
    load_on_first_use(f"empcause_{_name}", OPERATORS, partial(why_not_loaded, _name))


def _has_kernels(name: str, device_type: str) -> bool:
    """Whether a loaded backend takes tensors of this device; Triton's interpreter and the emulator of CUDA take the CPU's."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and find_kernel(f"empcause_{name}::attention", key) is not None


def _why_not(backend: Backend, device_type: str, dtype: torch.dtype) -> str | None:
    """Returns why a backend cannot take tensors of this device and dtype; None if it can."""
    why_not = why_not_loaded(backend.name)
    if why_not is not None:
        return why_not
    if backend.devices is not None and not _has_kernels(backend.name, device_type):
        takes = "the CPU" if _has_kernels(backend.name, "cpu") else "CUDA devices"
        return f"it takes tensors on {takes}, not on {device_type}"
    if dtype not in backend.dtypes:
        return f"it takes {', '.join(DTYPES[taken] for taken in backend.dtypes)}, not {dtype}"
    return None


@cache
def find(wanted: str | None, device_type: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """Returns the name of the wanted backend, or of the best one, and why it cannot take tensors of this device and dtype."""
    if wanted is not None:
        return wanted, _why_not(BACKENDS[wanted], device_type, dtype)
    made = (b for b in BACKENDS.values() if b.devices is None or device_type in b.devices)
    return next(backend.name for backend in made if _why_not(backend, device_type, dtype) is None), None
