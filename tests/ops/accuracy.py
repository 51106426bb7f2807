"""Errors of the operator and of torch's own attention with the same weights, both measured against fp64."""

from collections.abc import Iterable

import torch
from torch import Tensor

from empcause._C import build_info
from empcause.ops import biased_attention
from empcause.testing import NAMES, gradients

SHAPE = (1, 2, 64, 32)


def errors(
    dtype: torch.dtype, scale: float, seed: int, backend: str = "cpu", fused: bool = False
) -> tuple[Tensor, Tensor]:
    """Return root-mean-square errors of the output and all gradients for random inputs, the queries times `scale`.

    Args:
        fused: whether torch runs its fused kernel, which has no gradient of a bias, instead of its formula, which has one.

    Returns:
        Our errors and those of torch, each `[5]`, or `[4]` if fused.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    rows = ((query * scale).to(dtype), key.to(dtype), value.to(dtype))
    cause = torch.rand(SHAPE[0], SHAPE[2], generator=generator)
    hidden = torch.ones(SHAPE[2], SHAPE[2], dtype=torch.bool).triu(1)

    def theirs(query: Tensor, key: Tensor, value: Tensor, cause: Tensor = cause) -> Tensor:
        bias = torch.log1p(cause)[:, None, None].expand(SHAPE[0], 1, SHAPE[2], SHAPE[2])
        bias = bias.masked_fill(hidden, float("-inf"))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, bias)

    def ours(query: Tensor, key: Tensor, value: Tensor, cause: Tensor = cause) -> Tensor:
        return biased_attention(query, key, value, cause, backend=backend)

    leaves = rows if fused else (*rows, cause)
    truth = gradients(theirs, (*(tensor.double() for tensor in rows), cause.double()))
    got = [gradients(call, leaves) for call in (ours, theirs)]
    return tuple(  # type: ignore[return-value]
        torch.stack([(one.double() - exact).square().mean().sqrt() for one, exact in zip(of, truth, strict=False)])
        for of in got
    )


def against_torch(dtype: torch.dtype, scale: float, seeds: Iterable[int]) -> None:
    """Assert that over the seeds the root-mean-square error is at most 1.1 times torch's, and the worst at most twice its worst.

    The operator is compared with torch's fused kernel and with torch's formula for a bias that requires a gradient, which is
    stricter because it computes bf16 and fp16 in fp32 throughout. Kernels that multiply with bf16 instructions, as the fused
    kernel does, are compared with the fused kernel only.
    """
    bf16_products = dtype == torch.bfloat16 and build_info()["isa_selected"] == "avx512_bf16"
    for fused in (True,) if bf16_products else (True, False):
        ours, theirs = map(torch.stack, zip(*(errors(dtype, scale, seed, fused=fused) for seed in seeds), strict=True))
        mean = (ours.square().mean(0) / theirs.square().mean(0)).sqrt()
        worst = ours.amax(0) / theirs.amax(0)
        for name, one, other in zip(NAMES, mean.tolist(), worst.tolist(), strict=False):
            assert one <= 1.1, (name, dtype, scale, fused, one)
            assert other <= 2.0, (name, dtype, scale, fused, other)
