"""The reference over packed sequences: one call of the literal equations per sequence."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from empcause.ops.philox import dropout_keep_mask
from empcause.ops.reference import biased_attention_reference


def biased_attention_varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cause: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Computes `empcause.biased_attention_varlen`, whose arguments these are; `options` are strength, causal and scale.

    Returns:
        Output `[N, H, D]`, and the log-sum-exp `[H, N]`.

    Raises:
        RuntimeError: sums that do not rise from 0 to N (M), or a sequence longer than its bound.
    """
    outputs, sums = [query[:0]], [query.new_zeros((query.shape[1], 0), dtype=torch.float32)]
    starts_q = _starts("q", cu_seqlens_q, len(query), max_seqlen_q)
    starts_k = _starts("k", cu_seqlens_k, len(key), max_seqlen_k)
    for index, (q0, q1, k0, k1) in enumerate(zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)):
        keep = None
        if dropout_p > 0:
            assert seed is not None
            shape = (index + 1, query.shape[1], q1 - q0, k1 - k0)
            keep = dropout_keep_mask(seed, dropout_p, *shape, device=query.device)[index:]
        output, logsumexp = biased_attention_reference(
            query[q0:q1].transpose(0, 1)[None],
            key[k0:k1].transpose(0, 1)[None],
            value[k0:k1].transpose(0, 1)[None],
            None if cause is None else cause[None, ..., k0:k1],
            key_mask=None if key_mask is None else key_mask[None, k0:k1],
            dropout_p=dropout_p,
            keep=keep,
            **options,
        )
        outputs.append(output[0].transpose(0, 1))
        sums.append(logsumexp[0])
    return torch.cat(outputs), torch.cat(sums, dim=1)


def _starts(which: str, sums: Tensor, rows: int, longest: int) -> list[int]:
    starts = sums.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != rows or min(lengths, default=0) < 0:
        raise RuntimeError(f"cu_seqlens_{which} must rise from 0 to the {rows} rows, which {starts} does not.")
    if max(lengths, default=0) > longest:
        raise RuntimeError(
            f"a sequence of cu_seqlens_{which} has {max(lengths)} rows, more than max_seqlen_{which} = {longest}."
        )
    return starts
