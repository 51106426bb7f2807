"""Key weights w_j = key_mask_j * (1 + strength * cause_j) with the check of their values (compare csrc/cpu/weights.h).

What is stored is log2(w_j): minus infinity takes the key out, and the attention kernels add it in the one multiply-add before
exp2. The logarithm is taken once per key here instead of once per tile there.
"""

import triton
import triton.language as tl

from empcause.kernels.attention import UNSPECIALIZED

# Rounding may leave a weight meant as 0 slightly below it.
SMALLEST_WEIGHT: tl.constexpr = tl.constexpr(-1e-6)

# One rounding rule on every backend: the product is rounded before the sum, so C = -1 / strength gives the same everywhere.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}
BLOCK = 512


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
    """log2 of the weights, contiguous `[batch, num_heads, total_keys]`; one program per block of keys.

    Args:
        cause: fp32 with strides cause_batch, cause_head, 1; None: all weights are 0 or 1.
        head_strength: fp32 `[num_heads]`, or None: `strength` for all.
        key_mask: `[batch, total_keys]` bool, or None: all keys.
    """
    batch_head = tl.program_id(0) // num_blocks
    keys = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
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
    tl.store(log2_weight + tl.cast(batch_head, tl.int64) * total_keys + keys, tl.log2(weight), mask=inside)
