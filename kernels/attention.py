"""Code that every kernel shares: the problem's geometry (compare csrc/attention.h).

    x_ij = scale * q_i . k_j          for keys j <= i + query_offset, if causal
    b_ij = w_j exp(x_ij - LSE_i)      LSE_i = log sum_j w_j exp(x_ij)
    o_i  = sum_j Z_ij b_ij v_j        Z_ij the dropout factor, 0 or 1 / (1 - p)

The forward pass leaves LSE as a power of two. Where rows are of fp32 it has two parts, each with all its digits: `maximum`, which
a row's terms are relative to, infinite in a row that sees no key, and `log_total`, that of their sum. The backward pass makes the
same terms of the same numbers, so its probabilities sum to 1 however large the logits are. Where rows have 16 bits, the last
digits of LSE are nothing beside those that the rows lack, and the first part is all of it.

Kernels take a tensor `[batch, heads, rows, head_dim]` as a pointer and its first three strides; the last one is 1. Packed
tensors have one batch, whose stride is 0. What a kernel writes is laid out `[batch, rows, heads, head_dim]`,
quantities per row `[batch, heads, rows]`. Offsets are 64-bit.

`log2_weight` is None where all weights are 1; nothing is added to the logits then.
"""

import triton
import triton.language as tl

from empcause.ops import registration

# Arguments that change from call to call while the compiled code would gain nothing from knowing more of them: without this
# list a length that happens to be 1 or a multiple of 16 would compile the kernel once more.
UNSPECIALIZED = [
    "num_heads",
    "packed_heads",
    "total_queries",
    "total_keys",
    "max_queries",
    "num_outer",
    "num_blocks",
    "num_rows",
    "cause_heads",
    "parts",
    "part_keys",
    "threshold",
    "weight_batch",
    "weight_head",
    "cause_batch",
    "cause_head",
]

# Kernels work in powers of two: exp(x) = exp2(x * LOG2E).
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
FLAGGED_KEYS: tl.constexpr = tl.constexpr(registration.FLAGGED_KEYS)
# Flags that a program looks at together: those of 16384 keys.
FLAGS_AT_ONCE: tl.constexpr = tl.constexpr(128)


@triton.jit
def sequence(batch, cu_queries, cu_keys, total_queries, total_keys, query_offset):
    """Return the queries and keys of one sequence.

    Prefix sums that do not fit the tensors, which cannot be refused without waiting for a GPU, never lead outside them.

    Args:
        batch: number of the sequence.
        cu_queries, cu_keys: prefix sums `[sequences + 1]` int32 over the rows of packed tensors, or None.
        total_queries, total_keys: rows of the tensors.
        query_offset: pointer to the position of query 0 among the keys (int64), or None: the last query sees the last key.

    Returns:
        outer (the tensors' batch: 0 if packed), first query row, number of queries, first key row, number of keys, offset.
    """
    if cu_queries is None:
        outer = batch
        query_begin = 0
        num_queries = total_queries
        key_begin = 0
        num_keys = total_keys
    else:
        outer = 0
        query_begin = clamped(tl.load(cu_queries + batch), 0, total_queries)
        num_queries = clamped(tl.load(cu_queries + batch + 1) - query_begin, 0, total_queries - query_begin)
        key_begin = clamped(tl.load(cu_keys + batch), 0, total_keys)
        num_keys = clamped(tl.load(cu_keys + batch + 1) - key_begin, 0, total_keys - key_begin)
    if query_offset is None:
        offset = num_keys - num_queries
    else:
        # Beyond these bounds nothing more changes: no query sees a key, or all see all. So 32 bits hold it.
        offset = clamped(tl.load(query_offset), -num_queries, num_keys).to(tl.int32)
    return outer, query_begin, num_queries, key_begin, num_keys, offset


@triton.jit
def seen_keys(rows, first_row, num_queries, num_keys, offset, CAUSAL: tl.constexpr):
    """Return the range of keys that a block of query rows sees.

    Args:
        rows: numbers of the block's rows, `first_row` the first of them.
        offset: position of query 0 among the keys.

    Returns:
        all_see_end: every row sees the keys [0, all_see_end); end: no row sees a key from there on; the last key that each row
        sees.
    """
    end = num_keys
    all_see_end = num_keys
    last_keys = tl.zeros_like(rows) + num_keys - 1
    if CAUSAL:
        last_keys = tl.minimum(rows + offset, last_keys)
        end = tl.minimum(end, tl.minimum(first_row + rows.shape[0], num_queries) + offset)
        all_see_end = tl.minimum(all_see_end, tl.maximum(first_row + offset + 1, 0))
    return all_see_end, end, last_keys


@triton.jit
def present_end(flags, first_key, end):
    """Return up to which key no key is absent, counted from `first_key` on, and at most `end`.

    A flag (weights.py) tells of a group of keys: if one of them is absent, all count as absent, those before `first_key` too.

    Args:
        flags: pointer to the first flag of the batch and head.
        first_key: number of the first key in the tensor.
        end: 0 or more; the tensor has first_key + end keys or more.
    """
    flags_end = tl.cdiv(first_key + end, FLAGGED_KEYS)
    for start in tl.range(first_key // FLAGGED_KEYS, flags_end, FLAGS_AT_ONCE, num_stages=1):
        flag = start + tl.arange(0, FLAGS_AT_ONCE)
        absent = tl.load(flags + flag, mask=flag < flags_end, other=0.0) != 0.0
        first_absent = tl.min(tl.where(absent, flag * FLAGGED_KEYS - first_key, end), 0)
        end = tl.minimum(end, tl.maximum(first_absent, 0))
    return end


@triton.jit
def load_weights(pointers, inside):
    """Load log2 of weights; where `inside` is False (None: nowhere) the key counts as absent."""
    if inside is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=float("-inf"))


@triton.jit
def clamped(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def row_pointer(tensor, strides, outer, head, row):
    """Return the pointer to the first element of a row of a strided tensor."""
    return (
        tensor
        + tl.cast(outer, tl.int64) * strides[0]
        + tl.cast(head, tl.int64) * strides[1]
        + tl.cast(row, tl.int64) * strides[2]
    )


@triton.jit
def result_index(outer, head, row, num_rows, num_heads):
    """Return the number of a row in a tensor laid out `[batch, rows, heads]`."""
    return (tl.cast(outer, tl.int64) * num_rows + row) * num_heads + head


@triton.jit
def row_index(outer, head, row, num_rows, num_heads):
    """Return the number of a row in a quantity `[batch, heads, rows]`."""
    return (tl.cast(outer, tl.int64) * num_heads + head) * num_rows + row


@triton.jit
def load_rows(pointer, stride, present, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load `[ROWS, BLOCK_D]` from the row at `pointer` on: zeros where `present` is False (None: nowhere) and beyond HEAD_DIM."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    # In a loop over tiles these offsets stay as they are, and only the pointer moves.
    pointers = pointer + (tl.arange(0, ROWS).to(tl.int64)[:, None] * stride + columns)
    if HEAD_DIM == BLOCK_D:
        if present is None:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=present[:, None], other=0.0)
    else:
        if present is None:
            return tl.load(pointers, mask=columns < HEAD_DIM, other=0.0)
        else:
            return tl.load(pointers, mask=present[:, None] & (columns < HEAD_DIM), other=0.0)


@triton.jit
def store_rows(pointer, stride, values, inside, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store `[ROWS, BLOCK_D]` in the tensor's dtype, where `inside` is True and up to HEAD_DIM."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    pointers = pointer + (tl.arange(0, ROWS).to(tl.int64)[:, None] * stride + columns)
    mask = inside[:, None] & (columns < HEAD_DIM)
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def logsumexp_pointer(statistics, outer, head, row, num_rows, num_heads, dtype: tl.constexpr):
    """Return the pointer to LSE of a row in `[batch, heads, parts, rows]`: two parts where rows are of fp32, else one."""
    parts: tl.constexpr = 2 if dtype == tl.float32 else 1
    return statistics + (tl.cast(outer, tl.int64) * num_heads + head) * parts * num_rows + row


@triton.jit
def store_logsumexp(pointers, num_rows, maximum, total, inside, dtype: tl.constexpr):
    """Store LSE of rows.

    Args:
        maximum: powers of two that the rows' terms are relative to.
        total: sums of the terms, 0 where no key is seen.
    """
    dead = total == 0.0
    log_total = tl.log2(tl.where(dead, 1.0, total))
    if dtype == tl.float32:
        tl.store(pointers + num_rows, log_total, mask=inside)
    else:
        maximum += log_total
    tl.store(pointers, tl.where(dead, float("inf"), maximum), mask=inside)


@triton.jit
def load_logsumexp(pointers, num_rows, inside, dtype: tl.constexpr):
    """Load LSE of rows in two parts, `maximum` and `log_total`; the first is infinite where no key is seen."""
    maximum = tl.load(pointers, mask=inside, other=float("inf"))
    log_total = tl.zeros_like(maximum)
    if dtype == tl.float32:
        log_total = tl.load(pointers + num_rows, mask=inside, other=0.0)
    return maximum, log_total


@triton.jit
def shifted(pointer, rows, stride):
    """Return the pointer to the row that is `rows` rows further."""
    return pointer + tl.cast(rows, tl.int64) * stride
