"""Backward pass: probabilities are computed again from what the forward pass left of each row (compare csrc/cpu/backward.h).

    e_ij = exp(x_ij - LSE_i)               b_ij = w_j e_ij
    dP_ij = Z_ij (do_i . v_j)              delta_i = do_i . o_i
    grad_value_j = sum_i b_ij Z_ij do_i    dS_ij = b_ij (dP_ij - delta_i)
    grad_weight_j = sum_i e_ij (dP_ij - delta_i)

The weight is part of the exponent, as in the forward pass, and what is summed for grad_weight is w grad_weight. Where a key
has weight 0, and so no b, it is left out: then e is what grad_weight needs.

Two kernels: first delta and grad_query, where a program owns a block of query rows and walks through the keys; then grad_key,
grad_value and grad_weight, where it owns a block of keys of a key head and walks through the query rows of every head that shares
it, and reads their delta. Nothing is shared between programs, so there are no atomics and every sum has one order.

Kept probabilities share the factor z = 1 / (1 - p), so dP - delta = z (do . v - delta / z) where kept: the loops compute with
delta / z, and z is multiplied once, at the end.
"""

import triton
import triton.language as tl

from empcause.kernels.attention import (
    LOG2E,
    UNSPECIALIZED,
    load_logsumexp,
    load_rows,
    load_weights,
    logsumexp_pointer,
    present_end,
    result_index,
    row_index,
    row_pointer,
    seen_keys,
    sequence,
    shifted,
    store_rows,
)
from empcause.kernels.dropout import kept

# e may overflow for a key whose weight is 0, where only grad_weight uses it: x - LSE is capped at 80 there, as on every backend;
# here as a power of two.
LARGEST_EXPONENT: tl.constexpr = tl.constexpr(80.0 * 1.4426950408889634)


@triton.jit
def attend_backward_queries(
    grad_query,
    q,
    do,
    maximum,
    log_total,
    d,
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
    """Add to grad_query of one block of query rows what the keys [begin, end) give, tile by tile.

    Args:
        grad_query: running sum, in units of z and without the scale.
        maximum, log_total: of LSE, in powers of two; d: delta / z.
        key, value, log2_weight: pointers to key 0; log2_weight may be None.
        last_keys: the last key that each row sees.
        BOUNDED: some row may not see every key of the tiles, some keys may be absent, or the tiles reach beyond num_keys.
    """
    columns = tl.arange(0, BLOCK_N)
    # As in the forward pass, which rows are loaded follows from weights that are loaded themselves.
    STAGES: tl.constexpr = NUM_STAGES if (not BOUNDED) or (log2_weight is None) else 2 * NUM_STAGES - 1
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        start = tl.multiple_of(start, BLOCK_N)
        if BOUNDED:
            present = columns < num_keys - start
            last_columns = last_keys - start
        else:
            present = None
        if log2_weight is not None:
            bias = load_weights(log2_weight + start + columns, present)
            if BOUNDED:
                present = bias > float("-inf")
        # 0 * NaN would reach the sum, so rows of absent keys are not loaded; their b is exp2 of minus infinity.
        k = load_rows(shifted(key, start, key_stride), key_stride, present, BLOCK_N, HEAD_DIM, BLOCK_D)
        v = load_rows(shifted(value, start, value_stride), value_stride, present, BLOCK_N, HEAD_DIM, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if log2_weight is None:
            logits *= scale
        else:
            logits = tl.fma(logits, scale, bias[None, :])
        b = tl.exp2(logits - maximum[:, None] - log_total[:, None])
        grad_probability = tl.dot(do, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            keep = kept(seed, batch_head, first_row, start, threshold, BLOCK_M, BLOCK_N)
            grad_probability = tl.where(keep, grad_probability, 0.0)
        grad_logits = b * (grad_probability - d[:, None])
        if BOUNDED:
            grad_logits = tl.where(columns[None, :] <= last_columns[:, None], grad_logits, 0.0)
        grad_query = tl.dot(grad_logits.to(k.dtype), k, grad_query, input_precision="ieee")
    return grad_query


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_queries_kernel(
    output,
    grad_output,
    query,
    key,
    value,
    log2_weight,
    statistics,
    delta,
    grad_query,
    cu_queries,
    cu_keys,
    query_offset,
    seed,
    output_batch_stride,
    output_head_stride,
    output_row_stride,
    grad_output_batch_stride,
    grad_output_head_stride,
    grad_output_row_stride,
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
    """Store delta and grad_query; one program has a block of query rows of a head, as in the forward pass."""
    batch_head = tl.program_id(0) // num_blocks
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

    index = row_index(outer, head, query_begin + rows, total_queries, num_heads)
    dtype: tl.constexpr = query.dtype.element_ty
    lse = logsumexp_pointer(statistics, outer, head, query_begin + rows, total_queries, num_heads, dtype)
    maximum, log_total = load_logsumexp(lse, total_queries, inside, dtype)
    alive = maximum != float("inf")
    strides = (output_batch_stride, output_head_stride, output_row_stride)
    output = row_pointer(output, strides, outer, head, query_begin + first_row)
    strides = (grad_output_batch_stride, grad_output_head_stride, grad_output_row_stride)
    grad_output = row_pointer(grad_output, strides, outer, head, query_begin + first_row)
    # A row that sees no key is not loaded, so that its delta is 0. Few columns are summed at a time: with all of them at once the
    # loops below would have fewer registers.
    COLUMNS: tl.constexpr = min(BLOCK_D, 32)
    d = tl.zeros([BLOCK_M], tl.float32)
    for column in tl.static_range(0, BLOCK_D, COLUMNS):
        o = load_rows(output + column, output_row_stride, alive, BLOCK_M, HEAD_DIM - column, COLUMNS)
        do = load_rows(grad_output + column, grad_output_row_stride, alive, BLOCK_M, HEAD_DIM - column, COLUMNS)
        d += tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + index, d, mask=inside)
    d /= kept_factor
    do = load_rows(grad_output, grad_output_row_stride, alive, BLOCK_M, HEAD_DIM, BLOCK_D)
    strides = (query_batch_stride, query_head_stride, query_row_stride)
    query = row_pointer(query, strides, outer, head, query_begin + first_row)
    q = load_rows(query, query_row_stride, alive, BLOCK_M, HEAD_DIM, BLOCK_D)
    strides = (key_batch_stride, key_head_stride, key_row_stride)
    key = row_pointer(key, strides, outer, head // group, key_begin)
    strides = (value_batch_stride, value_head_stride, value_row_stride)
    value = row_pointer(value, strides, outer, head // group, key_begin)

    # Every row sees the keys [0, whole_end), and none of them is absent.
    whole_end, end, last_keys = seen_keys(rows, first_row, num_queries, num_keys, offset, CAUSAL)
    if log2_weight is not None:
        log2_weight = row_pointer(log2_weight, (weight_batch, weight_head, 1), outer, head, 0)
        whole_end = present_end(log2_weight + total_keys, key_begin, whole_end)
        log2_weight += key_begin
    whole_end = whole_end // BLOCK_N * BLOCK_N
    query_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for bounded in tl.static_range(2):
        query_sum = attend_backward_queries(
            query_sum,
            q,
            do,
            maximum,
            log_total,
            d,
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

    place = result_index(outer, head, query_begin + first_row, total_queries, num_heads) * HEAD_DIM
    query_sum *= scale * kept_factor / LOG2E
    store_rows(grad_query + place, num_heads * HEAD_DIM, query_sum, inside, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def attend_backward_keys(
    grad_key,
    grad_value,
    grad_weight,
    k,
    v,
    bias,
    query,
    grad_output,
    lse,
    delta,
    total_queries,
    query_stride,
    grad_output_stride,
    first_rows,
    first_key,
    begin,
    end,
    num_queries,
    scale,
    seed,
    batch_head,
    threshold,
    kept_factor,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    BOUNDED: tl.constexpr,
    DROPOUT: tl.constexpr,
    CAUSE_GRAD: tl.constexpr,
):
    """Add to the sums of one block of keys what a head's query rows [begin, end) give; tiles are `[keys, rows]`.

    Args:
        grad_key, grad_value, grad_weight: running sums; the first two in units of z, grad_key also without the scale, and
            grad_weight times the weight where a key has one.
        bias: log2 of the keys' weights, or None.
        query, grad_output, lse, delta: pointers to row 0.
        first_rows: the first row that sees each key, or None: all rows see all of them.
        BOUNDED: a row may not see every key of the block, or some of them are absent.
    """
    SOME_ABSENT: tl.constexpr = BOUNDED and bias is not None
    if bias is not None:
        bias = bias[:, None]
    if SOME_ABSENT:
        present = bias > float("-inf")
        bias = tl.where(present, bias, 0.0)
    columns = tl.arange(0, BLOCK_M)
    # Which rows are loaded follows, if BOUNDED, from LSE that is loaded itself: a pipeline of two levels.
    STAGES: tl.constexpr = 2 * NUM_STAGES - 1 if BOUNDED else NUM_STAGES
    for start in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        start = tl.multiple_of(start, BLOCK_M)
        inside = columns < num_queries - start
        maximum, log_total = load_logsumexp(lse + start + columns, total_queries, inside, k.dtype)
        d = tl.load(delta + start + columns, mask=inside, other=0.0) / kept_factor
        # Rows that see no key take no part, whatever stands in them, nor do rows beyond the end: they are zeros, and so is all
        # they add. A row that sees every key of a block without absent ones is none of the former.
        if BOUNDED:
            inside = maximum != float("inf")
        q = load_rows(shifted(query, start, query_stride), query_stride, inside, BLOCK_M, HEAD_DIM, BLOCK_D)
        do = load_rows(
            shifted(grad_output, start, grad_output_stride), grad_output_stride, inside, BLOCK_M, HEAD_DIM, BLOCK_D
        )

        logits = tl.dot(k, tl.trans(q), input_precision="ieee")
        if bias is None:
            logits *= scale
        else:
            logits = tl.fma(logits, scale, bias)
        exponent = logits - maximum[None, :] - log_total[None, :]
        if SOME_ABSENT:
            exponent = tl.where(exponent > LARGEST_EXPONENT, LARGEST_EXPONENT, exponent)  # NaN stays
        e = tl.exp2(exponent)
        if BOUNDED and first_rows is not None:
            e = tl.where((first_rows - start)[:, None] <= columns[None, :], e, 0.0)
        b = e
        if SOME_ABSENT:
            b = tl.where(present, e, 0.0)
        if DROPOUT:
            keep = tl.trans(kept(seed, batch_head, start, first_key, threshold, BLOCK_M, BLOCK_N))
            b = tl.where(keep, b, 0.0)
        grad_value = tl.dot(b.to(do.dtype), do, grad_value, input_precision="ieee")
        grad_probability = tl.dot(v, tl.trans(do), input_precision="ieee")
        if DROPOUT:
            grad_probability = tl.where(keep, grad_probability, 0.0)
        e *= grad_probability - d[None, :]
        if CAUSE_GRAD:
            grad_weight += tl.sum(e, 1)
        if SOME_ABSENT:
            e = tl.where(present, e, 0.0)
        grad_key = tl.dot(e.to(q.dtype), q, grad_key, input_precision="ieee")
    return grad_key, grad_value, grad_weight


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_keys_kernel(
    grad_output,
    query,
    key,
    value,
    log2_weight,
    key_mask,
    statistics,
    delta,
    grad_key,
    grad_value,
    grad_weight,
    cu_queries,
    cu_keys,
    query_offset,
    seed,
    grad_output_batch_stride,
    grad_output_head_stride,
    grad_output_row_stride,
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
    CAUSE_GRAD: tl.constexpr,
):
    """Store grad_key, grad_value and, if CAUSE_GRAD, grad_weight `[batch, num_heads, total_keys]`.

    One program has a block of keys of a key head.
    """
    num_key_heads = num_heads // group
    batch_key_head = tl.program_id(0) // num_blocks
    batch = batch_key_head // num_key_heads
    key_head = batch_key_head % num_key_heads
    outer, query_begin, num_queries, key_begin, num_keys, offset = sequence(
        batch, cu_queries, cu_keys, total_queries, total_keys, query_offset
    )
    # Causal or not, the first block has the most rows, and starts first.
    first_key = tl.program_id(0) % num_blocks * BLOCK_N
    if first_key >= num_keys:
        return
    keys = first_key + tl.arange(0, BLOCK_N)
    inside = keys < num_keys
    strides = (key_batch_stride, key_head_stride, key_row_stride)
    key = row_pointer(key, strides, outer, key_head, key_begin + first_key)
    k = load_rows(key, key_row_stride, inside, BLOCK_N, HEAD_DIM, BLOCK_D)
    strides = (value_batch_stride, value_head_stride, value_row_stride)
    value = row_pointer(value, strides, outer, key_head, key_begin + first_key)
    v = load_rows(value, value_row_stride, inside, BLOCK_N, HEAD_DIM, BLOCK_D)
    query_strides = (query_batch_stride, query_head_stride, query_row_stride)
    grad_output_strides = (grad_output_batch_stride, grad_output_head_stride, grad_output_row_stride)

    # Rows before `begin` see none of these keys, rows from `all_see_begin` on see them all.
    begin = 0
    all_see_begin = 0
    first_rows = None
    if CAUSAL:
        first_rows = keys - offset
        begin = tl.minimum(tl.maximum(first_key - offset, 0), num_queries) // BLOCK_M * BLOCK_M
        all_see_begin = (
            tl.cdiv(tl.minimum(tl.maximum(first_key + BLOCK_N - 1 - offset, 0), num_queries), BLOCK_M) * BLOCK_M
        )
    key_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(group):
        head = key_head * group + member
        whole_begin = all_see_begin
        if log2_weight is not None:
            weights = row_pointer(log2_weight, (weight_batch, weight_head, 1), outer, head, key_begin)
            bias = load_weights(weights + keys, inside)
            # With an absent key in the block, all rows go through the loop that looks at each weight.
            any_absent = tl.max((inside & (bias == float("-inf"))).to(tl.int32), 0)
            whole_begin = tl.where(any_absent > 0, num_queries, whole_begin)
        else:
            bias = None
        weight_sum = tl.zeros([BLOCK_N], tl.float32)
        for bounded in tl.static_range(1 if CAUSAL or (log2_weight is not None) else 0, -1, -1):
            key_sum, value_sum, weight_sum = attend_backward_keys(
                key_sum,
                value_sum,
                weight_sum,
                k,
                v,
                bias,
                row_pointer(query, query_strides, outer, head, query_begin),
                row_pointer(grad_output, grad_output_strides, outer, head, query_begin),
                logsumexp_pointer(statistics, outer, head, query_begin, total_queries, num_heads, k.dtype),
                delta + row_index(outer, head, query_begin, total_queries, num_heads),
                total_queries,
                query_row_stride,
                grad_output_row_stride,
                first_rows,
                first_key,
                begin if bounded else whole_begin,
                whole_begin if bounded else num_queries,
                num_queries,
                scale,
                seed,
                batch * num_heads + head,
                threshold,
                kept_factor,
                HEAD_DIM,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                NUM_STAGES,
                bounded == 1,
                DROPOUT,
                CAUSE_GRAD,
            )
        if CAUSE_GRAD:
            # Divided by the weight in two steps, as fp32 does not hold the inverse of the largest ones.
            root = tl.exp2(tl.where(bias > float("-inf"), bias, 0.0) * -0.5)
            weight_sum = weight_sum * kept_factor * root * root
            if key_mask is not None:
                mask = tl.load(
                    key_mask + tl.cast(outer, tl.int64) * total_keys + key_begin + keys, mask=inside, other=0
                )
                weight_sum = tl.where(mask != 0, weight_sum, 0.0)
            index = row_index(outer, head, key_begin + keys, total_keys, num_heads)
            tl.store(grad_weight + index, weight_sum, mask=inside)

    place = result_index(outer, key_head, key_begin + first_key, total_keys, num_key_heads) * HEAD_DIM
    stride = num_key_heads * HEAD_DIM
    # `scale` is that of exp2: times log2(e).
    key_sum *= scale * kept_factor / LOG2E
    store_rows(grad_key + place, stride, key_sum, inside, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(grad_value + place, stride, value_sum * kept_factor, inside, BLOCK_N, HEAD_DIM, BLOCK_D)
