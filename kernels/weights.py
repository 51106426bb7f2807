"""Key weights w_j = key_mask_j * (1 + strength * cause_j) with the check of their values, and the gradient of the cause.

What is stored is log2(w_j): minus infinity takes the key out, and the attention kernels add it in the one multiply-add before
exp2. The logarithm is taken once per key here instead of once per tile there. Behind the weights of a row stands one flag for
every FLAGGED_KEYS keys: 1 where any of them is absent, that is masked or of weight 0. From the flags the attention kernels know
for which tiles they need not look at single keys (`attention.present_end`).

Compare csrc/cpu/weights.h and csrc/cuda/weights.h.
"""

import triton
import triton.language as tl

from empcause.kernels.attention import FLAGGED_KEYS, UNSPECIALIZED

# Rounding may leave a weight meant as 0 slightly below it.
SMALLEST_WEIGHT: tl.constexpr = tl.constexpr(-1e-6)

# One rounding rule on every backend: the product is rounded before the sum, so C = -1 / strength gives the same everywhere.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
BLOCK = 512  # keys of a program, a multiple of FLAGGED_KEYS


@triton.jit(debug=True, do_not_specialize=UNSPECIALIZED)
def weights_kernel(
    cause,
    head_strength,
    key_mask,
    log2_weight,
    strength,
    cause_batch,
    cause_head,
    num_heads,
    total_keys,
    num_blocks,
    BLOCK: tl.constexpr,
):
    """Store log2 of the weights and the flags, `[batch, num_heads, total_keys + flags]`; a program has a block of keys.

    Args:
        cause: fp32 with strides cause_batch, cause_head, 1; None: all weights are 0 or 1.
        head_strength: fp32 `[num_heads]`, or None: `strength` for all.
        key_mask: `[batch, total_keys]` bool, or None: all keys.
    """
    batch_head = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    keys = block * BLOCK + tl.arange(0, BLOCK)
    batch = tl.cast(batch_head // num_heads, tl.int64)
    head = batch_head % num_heads
    present = keys < total_keys
    inside = present
    if key_mask is not None:
        present = present & (tl.load(key_mask + batch * total_keys + keys, mask=inside, other=0) != 0)
    weight = tl.where(present, 1.0, 0.0)
    if cause is not None:
        if head_strength is not None:
            strength = tl.load(head_strength + head)
        # The cause of a masked key is not read, whatever it is, NaN included.
        values = tl.load(cause + batch * cause_batch + head * cause_head + keys, mask=present, other=0.0)
        product = strength * values
        biased = 1.0 + product
        fine = (biased >= SMALLEST_WEIGHT) & (biased < float("inf"))
        tl.device_assert(
            fine | (present == 0),
            "cause must be finite with 1 + strength * cause >= 0 wherever key_mask is True",
        )
        weight = tl.where(present, tl.maximum(biased, 0.0), 0.0)
    result = tl.log2(weight)
    num_flags = tl.cdiv(total_keys, FLAGGED_KEYS)
    log2_weight += tl.cast(batch_head, tl.int64) * (total_keys + num_flags)
    tl.store(log2_weight + keys, result, mask=inside)
    absent = tl.where(inside & (result == float("-inf")), 1.0, 0.0)
    FLAGS: tl.constexpr = BLOCK // FLAGGED_KEYS
    flags = block * FLAGS + tl.arange(0, FLAGS)
    any_absent = tl.max(tl.reshape(absent, [FLAGS, FLAGGED_KEYS]), 1)
    tl.store(log2_weight + total_keys + flags, any_absent, mask=flags < num_flags)


# Keys of a program of grad_cause_kernel, and rows that it adds at a time.
GRAD_CAUSE_KEYS, GRAD_CAUSE_ROWS = 128, 16


@triton.jit(do_not_specialize=UNSPECIALIZED)
def grad_cause_kernel(
    grad_weight,
    head_strength,
    grad_cause,
    strength,
    num_heads,
    cause_heads,
    total_keys,
    num_rows,
    num_blocks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Store the gradient of the cause `[cause batch, cause_heads, total_keys]`; one program has a block of keys.

    It is strength * grad_weight, summed in one order over the rows of `[batch, num_heads, total_keys]` that share the cause.

    Args:
        head_strength: fp32 `[num_heads]`, or None: `strength` for all.
        cause_heads: 1 or num_heads.
        num_rows: rows that share a row of the cause.
    """
    cause_row = tl.program_id(0) // num_blocks
    keys = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    # The rows of one head, or of all heads, from the first batch that shares the cause.
    step = cause_heads
    first = cause_row // cause_heads * num_rows * cause_heads + cause_row % cause_heads
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_rows, ROWS):
        counts = start + tl.arange(0, ROWS)
        rows = first + counts * step
        mask = counts < num_rows
        pointers = grad_weight + rows.to(tl.int64)[:, None] * total_keys + keys[None, :]
        values = tl.load(pointers, mask=mask[:, None] & (keys < total_keys)[None, :], other=0.0)
        if head_strength is not None:
            values *= tl.load(head_strength + rows % num_heads, mask=mask, other=0.0)[:, None]
        else:
            values *= strength
        total += tl.sum(values, 0)
    tl.store(grad_cause + tl.cast(cause_row, tl.int64) * total_keys + keys, total, mask=keys < total_keys)
