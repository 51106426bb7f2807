"""Decoding: few query rows over many keys. The keys are split between programs, and a second kernel merges the parts.

Where the heads that share a key head also share their weights, one tile holds the rows of them all, and keys and values are
read once for all of them; weights of its own give each head its own tile.
"""

import triton
import triton.language as tl
from empcause.kernels.attention import (
    UNSPECIALIZED,
    logsumexp_pointer,
    result_index,
    row_index,
    row_pointer,
    sequence,
    store_logsumexp,
)
from empcause.kernels.forward import attend

MAX_SPLITS = 128


@triton.jit(do_not_specialize=UNSPECIALIZED)
def split_kernel(
    query,
    key,
    value,
    log2_weight,
    part_output,
    part_maximum,
    part_total,
    cu_queries,
    cu_keys,
    query_offset,
    query_strides,
    key_strides,
    value_strides,
    weight_batch,
    weight_head,
    num_heads,
    group,
    packed_heads,
    total_queries,
    total_keys,
    max_queries,
    num_outer,
    splits,
    keys_per_split,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """One part of the keys: its output `[splits, num_outer, rows, heads, head_dim]`, and the maximum and total of its rows
    `[splits, num_outer, heads, rows]`, all fp32.

    Row r of the tile is query `r % max_queries` of head `first_head + r // max_queries`; `packed_heads` heads share the tile.
    """
    split = tl.program_id(0) % splits
    unit = tl.program_id(0) // splits
    batch = unit // (num_heads // packed_heads)
    first_head = unit % (num_heads // packed_heads) * packed_heads
    outer, query_begin, num_queries, key_begin, num_keys, offset = sequence(
        batch, cu_queries, cu_keys, total_queries, total_keys, query_offset
    )
    packed = tl.arange(0, BLOCK_M)
    rows = packed % max_queries
    heads = first_head + packed // max_queries
    inside = (packed < packed_heads * max_queries) & (rows < num_queries)
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] & (columns < HEAD_DIM)
    q = tl.load(
        row_pointer(query, query_strides, outer, heads, query_begin + rows)[:, None] + columns, mask=mask, other=0.0
    )

    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, num_keys)
    seen_by_all = end
    last_keys = tl.full([BLOCK_M], 0, tl.int32) + num_keys - 1
    if CAUSAL:
        last_keys = tl.minimum(rows + offset, last_keys)
        end = tl.minimum(end, offset + num_queries)
        seen_by_all = tl.minimum(end, offset + 1)
    full = begin + tl.maximum(seen_by_all - begin, 0) // BLOCK_N * BLOCK_N
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for bounded in tl.static_range(2):
        accumulator, row_max, row_sum = attend(
            accumulator,
            row_max,
            row_sum,
            q,
            row_pointer(key, key_strides, outer, first_head // group, key_begin),
            row_pointer(value, value_strides, outer, first_head // group, key_begin),
            row_pointer(log2_weight, (weight_batch, weight_head, 1), outer, first_head, key_begin),
            key_strides[2],
            value_strides[2],
            0,
            last_keys,
            full if bounded else begin,
            end if bounded else full,
            num_keys,
            scale,
            None,
            0,
            0,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            bounded == 1,
            False,
        )

    dead = row_sum == 0.0
    result = tl.where(dead[:, None], 0.0, accumulator / tl.where(dead, 1.0, row_sum)[:, None])
    part = split * num_outer + outer
    place = result_index(part, heads, query_begin + rows, total_queries, num_heads)
    tl.store(part_output + place[:, None] * HEAD_DIM + columns, result, mask=mask)
    index = row_index(part, heads, query_begin + rows, total_queries, num_heads)
    tl.store(part_maximum + index, row_max, mask=inside)
    tl.store(part_total + index, row_sum, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_kernel(
    part_output,
    part_maximum,
    part_total,
    output,
    statistics,
    num_heads,
    total_queries,
    num_outer,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Merges the parts in their order; one program per row of a head. Dead rows become 0."""
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0) // num_heads % total_queries
    outer = tl.program_id(0) // num_heads // total_queries
    columns = tl.arange(0, BLOCK_D)[None, :]
    per_part = tl.cast(num_outer, tl.int64) * total_queries * num_heads
    index = row_index(outer, head, row, total_queries, num_heads)
    part_maximum += index
    part_total += index
    place = result_index(outer, head, row, total_queries, num_heads)

    every = tl.arange(0, MAX_SPLITS)
    maxima = tl.load(part_maximum + every * per_part, mask=every < splits, other=float("-inf"))
    shift = tl.max(maxima, 0)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    totals = tl.load(part_total + every * per_part, mask=every < splits, other=0.0)
    total = tl.sum(totals * tl.exp2(maxima - shift), 0)
    result = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)
        inside = part < splits
        maximum = tl.load(part_maximum + part * per_part, mask=inside, other=float("-inf"))
        share = tl.load(part_total + part * per_part, mask=inside, other=0.0) * tl.exp2(maximum - shift)
        pointers = part_output + (part * per_part + place)[:, None] * HEAD_DIM + columns
        o = tl.load(pointers, mask=inside[:, None] & (columns < HEAD_DIM), other=0.0)
        result += tl.sum(share[:, None] * o, 0)
    dead = total == 0.0
    result = tl.where(dead, 0.0, result / tl.where(dead, 1.0, total))
    columns = tl.arange(0, BLOCK_D)
    place = place * HEAD_DIM + columns
    tl.store(output + place, result.to(output.dtype.element_ty), mask=columns < HEAD_DIM)
    dtype: tl.constexpr = output.dtype.element_ty
    lse = logsumexp_pointer(statistics, outer, head, row, total_queries, num_heads, dtype)
    store_logsumexp(lse, total_queries, shift, total, None, dtype)
