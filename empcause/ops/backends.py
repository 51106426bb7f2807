"""Which backends are built, which would run, and why."""

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("cpu", "reference")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _load_native() -> str | None:
    """Import the compiled module, which registers the operators; why not, if that fails."""
    try:
        importlib.import_module("empcause._C")
    except ImportError as error:
        return f"the compiled module is missing or does not fit the installed torch ({error})"
    return None


_WHY_NO_NATIVE = _load_native()


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

    def __str__(self) -> str:
        lines = [f"empcause {self.version}, torch {self.torch}"]
        for backend in self.backends:
            state = "runs here" if backend.runs else "built, does not run here" if backend.built else "not built"
            lines.append(f"  {backend.name:<10} {state:<26} {backend.reason}")
        return "\n".join(lines)


def info() -> Info:
    """What is built, what would run here, and why."""
    from empcause import __version__

    return Info(__version__, torch.__version__, (_cpu_info(), _reference_info()))


def _cpu_info() -> BackendInfo:
    if _WHY_NO_NATIVE is not None:
        return BackendInfo("cpu", False, False, _WHY_NO_NATIVE)
    native = importlib.import_module("empcause._C")
    try:
        facts = native.build_info()
    except RuntimeError as error:
        return BackendInfo("cpu", True, False, str(error))
    reason = (
        f"CPU tensors in fp32, bf16, fp16; instruction set {facts['isa_selected']} "
        f"(built: {', '.join(facts['isa_built'])}), {torch.get_num_threads()} threads, {facts['compiler']}, "
        f"for torch {facts['torch_target']} and newer"
    )
    return BackendInfo("cpu", True, True, reason)


def _reference_info() -> BackendInfo:
    return BackendInfo("reference", True, True, "any device and fp64: the equations in plain torch, quadratic memory")


def choose_backend(wanted: str | None, query: Tensor) -> str:
    """The backend for these tensors.

    Raises:
        RuntimeError: the wanted one is unknown, not built, or cannot take these tensors.
    """
    if wanted not in (None, *BACKENDS):
        raise RuntimeError(f"Unknown backend {wanted!r}; expected one of {', '.join(BACKENDS)}.")
    why_not = _WHY_NO_NATIVE
    if why_not is None and not query.is_cpu:
        why_not = f"it takes tensors on the CPU, not on {query.device}"
    if why_not is None and query.dtype not in _KERNEL_DTYPES:
        why_not = f"it takes fp32, bf16 and fp16, not {query.dtype}"
    if wanted == "reference" or (wanted is None and why_not is not None):
        return "reference"
    if why_not is not None:
        raise RuntimeError(f"The backend {wanted!r} cannot run this: {why_not}.")
    return "cpu"
