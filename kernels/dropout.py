"""Dropout from Philox4x32-10 (Salmon et al., 2011): the same bits as on every backend (compare csrc/cpu/dropout.h).

Key = seed, counter = (batch * heads + head, query row, key / 8, 0). The eight 16-bit lanes of a draw serve eight neighbouring
keys, low half of each word first; a probability is dropped where its lane is below round(p * 65536).
"""

import triton
import triton.language as tl


@triton.jit
def kept(seed, batch_head, first_row, first_key, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return which probabilities of a tile are kept: `[BLOCK_M, BLOCK_N]` from query row `first_row` and key `first_key` on.

    `first_key` is a multiple of 8, `seed` a pointer.
    """
    zero = tl.zeros([BLOCK_M, BLOCK_N // 8], tl.int32)
    rows = first_row + tl.arange(0, BLOCK_M)
    draws = first_key // 8 + tl.arange(0, BLOCK_N // 8)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), zero + batch_head, zero + rows[:, None], zero + draws[None, :], zero)
    # Dimensions appended: the high bit of a word's number, its low bit, the half. Flattened, that is the order of keys.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    threshold = tl.cast(threshold, tl.uint32)
    keep = tl.join((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)
    return tl.reshape(keep, [BLOCK_M, BLOCK_N])
