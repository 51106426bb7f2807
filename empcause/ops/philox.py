"""The dropout bits that every backend agrees on, from Philox4x32-10 (Salmon et al., 2011), in plain torch."""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `factor * x` for 32-bit values held in int64, without leaving int64."""
    low = factor * (x & 0xFFFF)
    high = factor * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Returns random bits from ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape, each holding 32-bit values.
        key: two 32-bit values, or 0-d int64 tensors of them.

    Returns:
        Four int64 tensors of 32 random bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def dropout_keep_mask(
    seed: int | Tensor, p: float, batch: int, heads: int, queries: int, keys: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns which probabilities survive dropout.

    Args:
        seed: 64-bit seed.
        p: probability of being dropped, in [0, 1).
        batch, heads, queries, keys: shape of the attention probabilities.
        device: where the mask is made.

    Returns:
        `[batch, heads, queries, keys]` bool, True = kept. Key = seed, counter = (batch * H + head, query, key // 8, 0); the
        eight 16-bit lanes of a draw serve eight neighbouring keys, low half of each word first.
    """
    blocks = -(-keys // 8)
    rows = torch.arange(batch * heads, device=device).view(-1, 1, 1)
    query = torch.arange(queries, device=device).view(1, -1, 1)
    block = torch.arange(blocks, device=device).view(1, 1, -1)
    counter = torch.broadcast_tensors(rows, query, block, torch.zeros((1, 1, 1), dtype=torch.int64, device=device))
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    threshold = math.floor(p * 65536 + 0.5)
    return (lanes >= threshold).flatten(-2)[..., :keys].view(batch, heads, queries, keys)
