"""The operator's correctness matrix, run on a device before anything is timed there: against fp64, the same bits every time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from empcause import biased_attention
from empcause.benchmarks.gate import disagreement
from ops.cases import Case, exact, gradients, plain_torch


def matrix() -> Iterator[Case]:
    """Cases over dtypes, head sizes, masks, dropout, shapes and layouts; those that matter most come first."""
    for dtype, dim in (
        (torch.bfloat16, 64),
        (torch.float16, 64),
        (torch.float32, 64),
        (torch.bfloat16, 128),
        (torch.bfloat16, 80),
        (torch.float32, 33),
        (torch.bfloat16, 256),
        (torch.float16, 16),
    ):
        size = {"dtype": dtype, "dim": dim}
        yield Case(**size, queries=150, keys=150, masked=True, layout="qkv")
        yield Case(**size, queries=129, keys=129, dropout_p=0.1, per_head=True, cause_shape="BHK")
        yield Case(**size, queries=1, keys=700, heads=6)
        yield Case(**size, queries=70, keys=300, causal=False, cause_shape="1K", layout="BNHD")


def judge(case: Case, backend: str, device: str) -> str | None:
    """What is wrong with a backend on a case of the matrix; None if nothing is."""
    tensors, options = case.make()
    options = {name: _on(device, value) if isinstance(value, Tensor) else value for name, value in options.items()}

    def call(*leaves: Tensor | None) -> Tensor:
        on_device = (None if leaf is None else _on(device, leaf) for leaf in leaves)
        return biased_attention(*on_device, **options, backend=backend).cpu()

    got, again = gradients(call, tensors), gradients(call, tensors)
    if not all(torch.equal(first, second) for first, second in zip(got, again, strict=True)):
        return "two runs differ"
    return disagreement(exact(case), got, plain_torch(case), case.dtype)


def _on(device: str, tensor: Tensor) -> Tensor:
    """A copy on the device that keeps the strides, those of a view into a larger buffer too."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)
