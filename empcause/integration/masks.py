"""The mask function: padding and cache position in one small tensor per key.

transformers asks a mask function what each query may see. Biased attention needs less than a square mask: for every key the
first query row that may see it. `[B, 1, 1, K]` integers hold that; `HIDDEN` stands for a key that nobody sees. The position of
the queries in the cache is in there too (a key at position j is first seen by row j - query_offset), which matters with a
static cache, where there are more keys than are filled. Being four-dimensional, the tensor passes through `generate` untouched.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, prepare_padding_mask

# A key that is never seen; far from any row, yet safe to subtract.
HIDDEN = 1 << 40
# Offset of a query that sees every key: attention that is not causal.
EVERYTHING = 1 << 30


def biased_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Mask function for `AttentionMaskInterface`; called by transformers.

    Args:
        batch_size, q_length, kv_length: B, Q, K.
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: the pattern; causal and bidirectional are understood.
        attention_mask: `[B, <= K]` bool, False at padding.
        device: where the mask is made.

    Returns:
        `[B, 1, 1, K]` int64, first query row that may see each key, or None where every key may be seen causally.

    Raises:
        ValueError: another pattern: sliding or chunked windows, packed sequences, custom overlays.
    """
    if mask_function is bidirectional_mask_function:
        q_offset, kv_offset = EVERYTHING, 0
    elif mask_function is not causal_mask_function:
        raise ValueError(
            'attn_implementation="empcause" does causal and bidirectional attention over padded batches; this model asks for '
            "another pattern (a sliding or chunked window, packed sequences found in position_ids, or a custom mask). "
            "For packed sequences pass an attention_mask of ones together with cu_seq_lens_q, cu_seq_lens_k, max_length_q and "
            "max_length_k."
        )
    elif attention_mask is None and isinstance(q_offset, int) and kv_length == q_length + q_offset and not kv_offset:
        return None
    first = torch.arange(kv_length, device=device) + (kv_offset - q_offset)
    first = first.expand(batch_size, kv_length)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        seen = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        first = torch.where(seen, first, HIDDEN)
    return first[:, None, None]


def decode_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Read a mask made by `biased_attention_mask`, without synchronising a GPU.

    Returns:
        key_mask `[B, K]` bool, and query_offset, a 0-d int64 tensor.

    Raises:
        ValueError: it is some other mask.
    """
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.dtype != torch.int64:
        raise ValueError(
            'attn_implementation="empcause" makes its own mask from a two-dimensional attention_mask; it was given a '
            f"{mask.dtype} mask of shape {list(mask.shape)}, and arbitrary 4-D masks are not supported."
        )
    first = mask[:, 0, 0]
    position = torch.arange(first.shape[1], device=mask.device)
    return first < HIDDEN, (position - first).amax()
