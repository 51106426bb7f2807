"""Forward pass: online softmax over tiles of keys, each row's keys always in the same order (compare csrc/cpu/forward.h)."""

import triton
import triton.language as tl

from empcause.kernels.attention import (
    UNSPECIALIZED,
    load_rows,
    load_weights,
    logsumexp_pointer,
    present_end,
    result_index,
    row_pointer,
    seen_keys,
    sequence,
    shifted,
    store_logsumexp,
    store_rows,
)
from empcause.kernels.dropout import kept


@triton.jit
def attend(
    accumulator,
    maximum,
    total,
    query,
    key,
    value,
    log2_weight,
    key_stride,
    value_stride,
    first_row,
    last_keys,
    begin,
    end,
    num_keys,
    scale,
    seed,
    batch_head,
    threshold,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    BOUNDED: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Attend from one block of query rows to the keys [begin, end), tile by tile.

    Args:
        accumulator, maximum, total: running output, unnormalised, with the maximum (in powers of two) it refers to and the
            sum of the weighted probabilities.
        query: the rows themselves; `first_row` the number of the first, for dropout.
        key, value, log2_weight: pointers to key 0; log2_weight may be None.
        last_keys: the last key that each row sees.
        scale: times log2(e).
        BOUNDED: some row may not see every key of the tiles, some keys may be absent, or the tiles reach beyond num_keys.

    Returns:
        accumulator, maximum, total.
    """
    columns = tl.arange(0, BLOCK_N)
    # Which rows of values are loaded follows from weights that are loaded themselves: a pipeline of two levels.
    STAGES: tl.constexpr = NUM_STAGES if (not BOUNDED) or (log2_weight is None) else 2 * NUM_STAGES - 1
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        start = tl.multiple_of(start, BLOCK_N)
        # Both bounds are relative to `start`: what is compared with them stays the same in every tile, in the same registers.
        if BOUNDED:
            inside = columns < num_keys - start
            last_columns = last_keys - start
        else:
            inside = None
        present = inside
        k = load_rows(shifted(key, start, key_stride), key_stride, inside, BLOCK_N, HEAD_DIM, BLOCK_D)
        logits = tl.dot(query, tl.trans(k), input_precision="ieee")
        if log2_weight is None:
            logits *= scale
        else:
            bias = load_weights(log2_weight + start + columns, inside)
            # Weight, scale and log2(e) are one multiply-add.
            logits = tl.fma(logits, scale, bias[None, :])
            if BOUNDED:
                present = bias > float("-inf")
        if BOUNDED:
            # NaN in an absent key must reach nothing.
            seen = present[None, :] & (columns[None, :] <= last_columns[:, None])
            logits = tl.where(seen, logits, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        probability = tl.exp2(logits - shift[:, None])
        correction = tl.exp2(maximum - shift)
        total = total * correction + tl.sum(probability, 1)
        maximum = new_maximum
        if DROPOUT:
            keep = kept(seed, batch_head, first_row, start, threshold, BLOCK_M, BLOCK_N)
            probability = tl.where(keep, probability, 0.0)
        # 0 * NaN would reach the output, so rows of absent keys are not loaded.
        v = load_rows(shifted(value, start, value_stride), value_stride, present, BLOCK_N, HEAD_DIM, BLOCK_D)
        accumulator = accumulator * correction[:, None]
        accumulator = tl.dot(probability.to(v.dtype), v, accumulator, input_precision="ieee")
    return accumulator, maximum, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    query,
    key,
    value,
    log2_weight,
    output,
    statistics,
    cu_queries,
    cu_keys,
    query_offset,
    seed,
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    value_batch_stride,
    value_head_stride,
    value_row_stride,
    weight_batch,
    weight_head,
    num_heads,
    group,
    total_queries,
    total_keys,
    num_blocks,
    scale,
    threshold,
    kept_factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Store output and LSE; one program has a block of query rows of a head, heads of one group side by side."""
    batch_head = tl.program_id(0) // num_blocks
    # A causal block at the end has the most keys: it starts first.
    block = num_blocks - 1 - tl.program_id(0) % num_blocks
    batch = batch_head // num_heads
    head = batch_head % num_heads
    outer, query_begin, num_queries, key_begin, num_keys, offset = sequence(
        batch, cu_queries, cu_keys, total_queries, total_keys, query_offset
    )
    first_row = block * BLOCK_M
    if first_row >= num_queries:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < num_queries

    strides = (query_batch_stride, query_head_stride, query_row_stride)
    query = row_pointer(query, strides, outer, head, query_begin + first_row)
    q = load_rows(query, query_row_stride, inside, BLOCK_M, HEAD_DIM, BLOCK_D)
    strides = (key_batch_stride, key_head_stride, key_row_stride)
    key = row_pointer(key, strides, outer, head // group, key_begin)
    strides = (value_batch_stride, value_head_stride, value_row_stride)
    value = row_pointer(value, strides, outer, head // group, key_begin)

    # Every row sees the keys [0, whole_end), and none of them is absent: neither indices nor weights are compared there.
    whole_end, end, last_keys = seen_keys(rows, first_row, num_queries, num_keys, offset, CAUSAL)
    if log2_weight is not None:
        log2_weight = row_pointer(log2_weight, (weight_batch, weight_head, 1), outer, head, 0)
        whole_end = present_end(log2_weight + total_keys, key_begin, whole_end)
        log2_weight += key_begin
    whole_end = whole_end // BLOCK_N * BLOCK_N
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for bounded in tl.static_range(2):
        accumulator, maximum, total = attend(
            accumulator,
            maximum,
            total,
            q,
            key,
            value,
            log2_weight,
            key_row_stride,
            value_row_stride,
            first_row,
            last_keys,
            whole_end if bounded else 0,
            end if bounded else whole_end,
            num_keys,
            scale,
            seed,
            batch_head,
            threshold,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            NUM_STAGES,
            bounded == 1,
            DROPOUT,
        )

    dead = total == 0.0
    factor = kept_factor / tl.where(dead, 1.0, total)
    result = tl.where(dead[:, None], 0.0, accumulator * factor[:, None])
    place = result_index(outer, head, query_begin + first_row, total_queries, num_heads) * HEAD_DIM
    store_rows(output + place, num_heads * HEAD_DIM, result, inside, BLOCK_M, HEAD_DIM, BLOCK_D)
    dtype: tl.constexpr = query.dtype.element_ty
    lse = logsumexp_pointer(statistics, outer, head, query_begin + rows, total_queries, num_heads, dtype)
    store_logsumexp(lse, total_queries, maximum, total, inside, dtype)
