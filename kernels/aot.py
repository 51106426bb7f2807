"""Compilation ahead of time, without a GPU: what the operators would launch on an architecture, as it would be compiled there.

The host code runs on meta tensors and its launches are recorded, so that they are written down in one place. It needs a process
without TRITON_INTERPRET.
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
    "forward": ("", "causal", "causal dropout", "causal packed", "causal unweighted"),
    "backward_keys": (
        "causal",
        "causal cause_grad",
        "causal dropout cause_grad",
        "causal cause_grad packed",
        "causal unweighted",
    ),
    "backward_queries": ("causal", "causal dropout", "causal packed", "causal unweighted"),
    "decode": ("causal", "causal packed", "causal unweighted"),
    "merge": ("",),
}


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel."""

    kernel: str
    dtype: str
    head_dim: int
    options: str  # words of "causal", "dropout", "cause_grad", "packed", "unweighted": neither cause nor key_mask


def shipped() -> Iterator[Variant]:
    """Yield every form whose figures are in the resource table. Kernels of weights have neither dtype nor head size."""
    yield Variant("weights", "fp32", 0, "")
    yield Variant("grad_cause", "fp32", 0, "")
    for kernel, every in _OPTIONS.items():
        for dtype in DTYPES:
            for head_dim in HEAD_DIMS:
                for options in every:
                    yield Variant(kernel, dtype, head_dim, options)


def compiled(variant: Variant, arch: int) -> Any:
    """Return Triton's CompiledKernel of a variant: `.asm["ptx"]`, `.asm["cubin"]`, `.metadata.shared`, `.metadata.num_warps`.

    Args:
        arch: compute capability times 10.
    """
    return _launches(variant, arch)[f"{variant.kernel}_kernel"].compiled(arch)


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments and options of its launch."""

    kernel: Any
    arguments: tuple
    options: dict[str, Any]

    def compiled(self, arch: int) -> Any:
        driver.set_active(_Absent(arch))
        try:
            return self.kernel.warmup(*self.arguments, grid=(1,), **self.options)
        finally:
            driver._active = None  # the next one to ask finds the machine's own


def launches(arch: int, cause_grad: bool, **arguments: Any) -> dict[str, Launch]:
    """Return what a forward and a backward call launch on an architecture, by the kernel's name.

    Args:
        arguments: those of `Call`, the tensors on the device "meta".
    """
    recorded = {}

    class Recorded(Call):
        def run(self, kernel: Any, programs: int, arguments: tuple, options: dict[str, Any]) -> None:
            recorded[kernel.__name__] = Launch(kernel, arguments, options)

        def architecture(self) -> int:
            return arch

    call = Recorded(**arguments)
    results = call.forward()
    call.backward(results[0], *results, cause_grad)
    return recorded


class _Absent:
    """Replaces Triton's driver and names the GPU to compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@cache
def _launches(variant: Variant, arch: int) -> dict[str, Launch]:
    batch, heads, queries, keys = 4, 8, 1 if variant.kernel in ("decode", "merge") else 1024, 1024
    dim, words = variant.head_dim or 64, variant.options.split()

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def rows(count: int) -> Tensor:
        tensor = meta(batch, count, heads, dim, dtype=DTYPES[variant.dtype])
        return tensor.flatten(0, 1) if "packed" in words else tensor.transpose(1, 2)

    query, key = rows(queries), rows(keys)
    cause = None if "unweighted" in words else meta(batch, keys, dtype=torch.float32)
    key_mask = None if cause is None else meta(batch, keys, dtype=torch.bool)
    sums, longest = None, (0, 0)
    if "packed" in words:
        cause, key_mask = (None if tensor is None else tensor.flatten() for tensor in (cause, key_mask))
        sums, longest = meta(batch + 1, dtype=torch.int32), (queries, keys)
    dropout = "dropout" in words
    return launches(
        arch,
        "cause_grad" in words or variant.kernel == "grad_cause",
        query=query,
        key=key,
        value=key,
        cause=cause,
        strength=1.0,
        head_strength=None,
        key_mask=key_mask,
        cu_seqlens_q=sums,
        cu_seqlens_k=sums,
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        causal="causal" in words,
        scale=dim**-0.5,
        dropout_p=0.1 if dropout else 0.0,
        seed=meta(dtype=torch.int64) if dropout else None,
        query_offset=None,
    )
