"""The reference over packed sequences: one call of the literal equations per sequence."""

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
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """See `empcause.biased_attention_varlen`; `options` are strength, causal, scale.

    Returns:
        Output `[N, H, D]`, and the log-sum-exp `[H, N]`.
    """
    outputs, sums = [query[:0]], [query.new_zeros((query.shape[1], 0), dtype=torch.float32)]
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
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
