"""Decoding: few query rows over many keys. Each program attends to a part of the keys, and a second kernel merges the results.

Where the heads that share a key head also share their weights, one tile holds the rows of them all, and keys and values are
read once for all of them; weights of its own give each head its own tile.
"""

import triton
import triton.language as tl

from empcause.kernels.attention import (
    UNSPECIALIZED,
    logsumexp_pointer,
    present_end,
    result_index,
    row_index,
    row_pointer,
    sequence,
    store_logsumexp,
)
from empcause.kernels.forward import attend

MAX_PARTS = 128


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decode_kernel(
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
    packed_heads,
    total_queries,
    total_keys,
    max_queries,
    num_outer,
    parts,
    part_keys,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Store what one part of the keys gives, in fp32.

    The output is `[parts, num_outer, rows, heads, head_dim]`, maximum and total of rows are `[parts, num_outer, heads, rows]`.

    Row r of the tile is query `r % max_queries` of head `first_head + r // max_queries`; `packed_heads` heads share the tile.
    """
    part = tl.program_id(0) % parts
    unit = tl.program_id(0) // parts
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
    strides = (query_batch_stride, query_head_stride, query_row_stride)
    query = row_pointer(query, strides, outer, heads, query_begin + rows)
    q = tl.load(query[:, None] + columns, mask=mask, other=0.0)
    strides = (key_batch_stride, key_head_stride, key_row_stride)
    key = row_pointer(key, strides, outer, first_head // group, key_begin)
    strides = (value_batch_stride, value_head_stride, value_row_stride)
    value = row_pointer(value, strides, outer, first_head // group, key_begin)

    begin = tl.minimum(part * part_keys, num_keys)
    end = tl.minimum(begin + part_keys, num_keys)
    whole_end = end
    last_keys = tl.full([BLOCK_M], 0, tl.int32) + num_keys - 1
    if CAUSAL:
        last_keys = tl.minimum(rows + offset, last_keys)
        end = tl.minimum(end, offset + num_queries)
        whole_end = tl.minimum(end, offset + 1)
    # Every row sees the keys of this part before whole_end, and none of them is absent.
    whole_end = tl.maximum(whole_end, begin)
    if log2_weight is not None:
        log2_weight = row_pointer(log2_weight, (weight_batch, weight_head, 1), outer, first_head, 0)
        whole_end = begin + present_end(log2_weight + total_keys, key_begin + begin, whole_end - begin)
        log2_weight += key_begin
    whole_end = begin + (whole_end - begin) // BLOCK_N * BLOCK_N
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
            0,
            last_keys,
            whole_end if bounded else begin,
            end if bounded else whole_end,
            num_keys,
            scale,
            None,
            0,
            0,
            HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            NUM_STAGES,
            bounded == 1,
            False,
        )

    dead = total == 0.0
    result = tl.where(dead[:, None], 0.0, accumulator / tl.where(dead, 1.0, total)[:, None])
    part_outer = part * num_outer + outer
    place = result_index(part_outer, heads, query_begin + rows, total_queries, num_heads)
    tl.store(part_output + place[:, None] * HEAD_DIM + columns, result, mask=mask)
    index = row_index(part_outer, heads, query_begin + rows, total_queries, num_heads)
    tl.store(part_maximum + index, maximum, mask=inside)
    tl.store(part_total + index, total, mask=inside)


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
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """Merge the parts in their order; one program has a row of a head. Rows that see no key become 0."""
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0) // num_heads % total_queries
    outer = tl.program_id(0) // num_heads // total_queries
    columns = tl.arange(0, BLOCK_D)[None, :]
    per_part = tl.cast(num_outer, tl.int64) * total_queries * num_heads
    index = row_index(outer, head, row, total_queries, num_heads)
    part_maximum += index
    part_total += index
    place = result_index(outer, head, row, total_queries, num_heads)

    every = tl.arange(0, MAX_PARTS)
    maxima = tl.load(part_maximum + every * per_part, mask=every < parts, other=float("-inf"))
    shift = tl.max(maxima, 0)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    totals = tl.load(part_total + every * per_part, mask=every < parts, other=0.0)
    total = tl.sum(totals * tl.exp2(maxima - shift), 0)
    result = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = part < parts
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
