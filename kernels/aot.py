"""Compilation ahead of time, without a GPU: what the operators would launch on an architecture, as it would be compiled there.

The host code runs on meta tensors with its launches recorded, so that nothing is said twice. Needs a process without
TRITON_INTERPRET.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from empcause.kernels.operators import Call

ARCHITECTURES = (80, 90, 100)
HEAD_DIMS = (64, 128, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Causal attention with and without what adds code to it; what is not causal runs one of its two loops.
_OPTIONS = {
    "forward": ("", "causal", "causal dropout"),
    "delta": ("",),
    "keys": ("causal", "causal cause_grad", "causal dropout cause_grad"),
    "queries": ("causal", "causal dropout"),
    "split": ("causal",),
    "merge": ("",),
}


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel."""

    kernel: str
    dtype: str
    head_dim: int
    options: str  # words of "causal", "dropout", "cause_grad"


def shipped() -> Iterator[Variant]:
    """Every form whose figures are looked after. The kernel of the weights knows neither dtype nor head size."""
    yield Variant("weights", "fp32", 0, "")
    for kernel, every in _OPTIONS.items():
        for dtype in DTYPES:
            for head_dim in HEAD_DIMS:
                for options in every:
                    yield Variant(kernel, dtype, head_dim, options)


def compiled(variant: Variant, arch: int) -> Any:
    """Triton's CompiledKernel of a variant: `.asm["ptx"]`, `.asm["cubin"]`, `.metadata.shared`, `.metadata.num_warps`.

    Args:
        arch: compute capability times 10.
    """
    kernel, arguments, options = _launches(variant, arch)[f"{variant.kernel}_kernel"]
    driver.set_active(_Absent(arch))
    try:
        return kernel.warmup(*arguments, grid=(1,), **options)
    finally:
        driver._active = None


class _Absent:
    """In the place of a driver: says which GPU to compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@cache
def _launches(variant: Variant, arch: int) -> dict[str, tuple[Any, tuple, dict[str, Any]]]:
    """What one forward and backward call of the variant's kind launches, by the kernel's name."""
    launches = {}

    class Recorded(Call):
        def launch(self, kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
            launches[kernel.__name__] = (kernel, arguments, options)

        def architecture(self) -> int:
            return arch

    batch, heads, queries, keys = 4, 8, 1 if variant.kernel in ("split", "merge") else 1024, 1024
    dim = variant.head_dim or 64

    def rows(count: int) -> Tensor:
        return torch.empty((batch, count, heads, dim), dtype=DTYPES[variant.dtype], device="meta").transpose(1, 2)

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key = rows(queries), rows(keys)
    bias = (meta(batch, keys, dtype=torch.float32), 1.0, None, meta(batch, keys, dtype=torch.bool))
    dropout, seed = (0.1, meta(dtype=torch.int64)) if "dropout" in variant.options else (0.0, None)
    call = Recorded(query, key, key, bias, None, "causal" in variant.options, dim**-0.5, dropout, seed, None)
    output, logsumexp = call.forward()
    call.backward(output, output, logsumexp, "cause_grad" in variant.options)
    return launches
