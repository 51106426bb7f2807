"""Which backends are built, which would run, and why."""

import importlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket, _OpNamespace

from empcause.ops.registration import OPERATORS, define, register, registered
from empcause.text import visible

# Best first, for tensors of each type of device; where none of these can run, the reference does.
_PREFERRED = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
KERNEL_BACKENDS = ("cpu", "triton", "cuda")
BACKENDS = (*KERNEL_BACKENDS, "reference")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUDA_LIBRARY = Path(__file__).parents[1] / "libempcause_cuda.so"


@dataclass(frozen=True)
class BackendInfo:
    """One backend: whether it is built, whether it would run here, and why."""

    name: str
    built: bool
    runs: bool
    reason: str


@dataclass(frozen=True)
class Info:
    """What `empcause.info()` returns; `str()` of it is a table."""

    version: str
    torch: str
    backends: tuple[BackendInfo, ...]

    def __getitem__(self, name: str) -> BackendInfo:
        return next(backend for backend in self.backends if backend.name == name)

    def __str__(self) -> str:
        lines = [f"empcause {self.version}, torch {self.torch}"]
        for backend in self.backends:
            state = "runs here" if backend.runs else "built, does not run here" if backend.built else "not built"
            lines.append(f"  {backend.name:<10} {state:<26} {backend.reason}")
        return "\n".join(lines)


def info() -> Info:
    """What is built, what would run here, and why."""
    from empcause import __version__

    backends = (_cpu_info(), _gpu_info("triton"), _gpu_info("cuda"), _reference_info())
    return Info(__version__, torch.__version__, backends)


def _cpu_info() -> BackendInfo:
    why_not = _load("cpu")
    if why_not is not None:
        return BackendInfo("cpu", False, False, why_not)
    try:
        facts = importlib.import_module("empcause._C").build_info()
    except UnicodeDecodeError:
        return BackendInfo("cpu", True, False, "EMPCAUSE_CPU_ISA is not UTF-8 text")
    except RuntimeError as error:
        return BackendInfo("cpu", True, False, visible(str(error)))
    reason = (
        f"CPU tensors in fp32, bf16, fp16; instruction set {facts['isa_selected']} "
        f"(built: {', '.join(facts['isa_built'])}), {torch.get_num_threads()} threads, {facts['compiler']}, "
        f"for torch {facts['torch_target']} and newer"
    )
    return BackendInfo("cpu", True, True, reason)


def _gpu_info(name: str) -> BackendInfo:
    why_not = _load(name)
    if why_not is not None:
        return BackendInfo(name, False, False, why_not)
    if _has_kernels(name, "cpu"):
        how = "in Triton's interpreter" if name == "triton" else "under the emulator"
        return BackendInfo(name, True, True, f"CPU tensors, {how}: to test and debug the GPU kernels, slow")
    if not torch.cuda.is_available():
        return BackendInfo(name, True, False, "torch sees no CUDA device")
    return BackendInfo(name, True, True, f"CUDA tensors in fp32, bf16, fp16; {torch.cuda.get_device_name()}")


def _reference_info() -> BackendInfo:
    return BackendInfo("reference", True, True, "any device and fp64: the equations in plain torch, quadratic memory")


def load_cuda(path: str | Path) -> None:
    """Load the CUDA backend from a library built elsewhere than beside the package, or built for the host's emulator.

    Args:
        path: `libempcause_cuda.so`, or `libempcause_cuda_emulation.so`, which takes CPU tensors.

    Raises:
        RuntimeError: a CUDA backend is loaded already.
        OSError: the file is missing or does not fit the installed torch.
    """
    if _load("cuda") is None:
        raise RuntimeError("The CUDA backend is loaded already.")
    torch.ops.load_library(path)
    register("empcause_cuda")
    _load.cache_clear()
    _find.cache_clear()


@cache
def _load(name: str) -> str | None:
    """Make `torch.ops.empcause_<name>` known to torch; why not, if that fails."""
    if f"empcause_{name}" in registered:
        return None
    if name == "cpu":
        try:
            importlib.import_module("empcause._C")
        except ImportError as error:
            return f"the compiled module is missing or does not fit the installed torch ({error})"
    elif name == "triton":
        if importlib.util.find_spec("triton") is None:
            return 'triton is not installed (pip install "empcause[gpu]")'
        try:
            module = importlib.import_module("empcause.kernels.operators")
        except ImportError as error:
            return f"the installed triton does not fit ({error})"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        define("empcause_triton", module, ["CUDA", "CPU"] if interpreted else ["CUDA"])
    else:
        if not _CUDA_LIBRARY.exists():
            return "built where asked for, with -DEMPCAUSE_CUDA=ON"
        try:
            torch.ops.load_library(_CUDA_LIBRARY)
        except OSError as error:
            return f"{_CUDA_LIBRARY.name} does not fit the installed torch ({error})"
    register(f"empcause_{name}")
    return None


class _Namespace(_OpNamespace):
    """`torch.ops.empcause_<name>`: the backend is loaded when somebody asks for an operator, as a saved program does by name."""

    __module__ = _OpNamespace.__module__  # operators have it in their names

    def __init__(self, backend: str) -> None:
        super().__init__(f"empcause_{backend}")
        self.backend = backend

    def __getattr__(self, name: str) -> OpOverloadPacket:
        if name in OPERATORS and (why_not := _load(self.backend)) is not None:
            raise AttributeError(f"The backend {self.backend!r} has no operators here: {why_not}.")
        return super().__getattr__(name)


for _name in KERNEL_BACKENDS:
    setattr(torch.ops, f"empcause_{_name}", _Namespace(_name))


def _has_kernels(name: str, device_type: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None or _load(name) is not None:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"empcause_{name}::attention", key)


# A compiler takes the answer as it is: loading a backend is not for it to trace.
@torch.compiler.assume_constant_result
def _choose(wanted: str | None, device_type: str, dtype: torch.dtype) -> tuple[str | None, str]:
    """The backend, or None and why the wanted one cannot run."""
    return _find(wanted, device_type, dtype)


@cache
def _find(wanted: str | None, device_type: str, dtype: torch.dtype) -> tuple[str | None, str]:
    if wanted == "reference":
        return wanted, ""
    takes_dtype = dtype in _KERNEL_DTYPES
    if wanted is None:
        kernels = (name for name in _PREFERRED.get(device_type, ()) if takes_dtype and _has_kernels(name, device_type))
        return next(kernels, "reference"), ""
    why_not = _load(wanted)
    if why_not is None and not _has_kernels(wanted, device_type):
        takes = "the CPU" if _has_kernels(wanted, "cpu") else "CUDA devices"
        why_not = f"it takes tensors on {takes}, not on {device_type}"
    if why_not is None and not takes_dtype:
        why_not = f"it takes fp32, bf16 and fp16, not {dtype}"
    return (wanted, "") if why_not is None else (None, why_not)


def choose_backend(wanted: str | None, query: Tensor) -> str:
    """The backend for these tensors.

    Raises:
        RuntimeError: the wanted one is unknown, not built, or cannot take these tensors.
    """
    if wanted is not None and wanted not in BACKENDS:
        raise RuntimeError(f"Unknown backend {wanted!r}; expected one of {', '.join(BACKENDS)}.")
    chosen, why_not = _choose(wanted, query.device.type, query.dtype)
    if chosen is None:
        raise RuntimeError(f"The backend {wanted!r} cannot run this: {why_not}.")
    return chosen
