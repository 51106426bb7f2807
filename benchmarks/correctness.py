"""The cases that a backend must get right on a device before anything is timed there."""

from collections.abc import Iterator
from typing import Any

import torch

from empcause.testing import Case, measured, verdict


def matrix() -> Iterator[Case]:
    """Yield cases over dtypes, head sizes, masks, dropout, shapes and layouts; those that matter most come first."""
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
        size: dict[str, Any] = {"dtype": dtype, "dim": dim}
        yield Case(**size, queries=150, keys=150, masked=True, layout="qkv")
        yield Case(**size, queries=129, keys=129, dropout_p=0.1, per_head=True, cause_shape="BHK")
        yield Case(**size, queries=1, keys=700, heads=6)
        yield Case(**size, queries=70, keys=300, causal=False, cause_shape="1K", layout="BNHD")


def judge(case: Case, backend: str, device: str) -> str | None:
    """Say what is wrong with a backend on a case: two runs differ, or its errors are too large. None if nothing is."""
    got, again = measured(case, backend, device), measured(case, backend, device)
    if not all(torch.equal(first, second) for first, second in zip(got, again, strict=True)):
        return "two runs differ"
    return verdict(case, backend, device)
