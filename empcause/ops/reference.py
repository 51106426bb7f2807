"""The paper's equations in plain torch: the baseline of all tests, and the backend where no kernel runs.

    x_ij = scale * q_i . k_j                                            for j <= i + query_offset (causal)
    p_ij = softmax_j(x_ij)
    b_ij = p_ij w_j / sum_j' p_ij' w_j',   w_j = key_mask_j (1 + strength * cause_j)        (eq 14-17, sum over keys)
    o_i  = sum_j b_ij Z_ij v_j                                          Z: dropout factor (eq 18)

It is computed as b = f e / sum(f e) with w = f 2^n, n = 0 but for weights too large for sums, and e = exp(x + n log 2 - m), m the
largest of these exponents over keys with w > 0: the same numbers, safe for every w.

A key with w = 0 has b = 0, yet a gradient of its weight, exp(x - LSE) (dP - D). As this may overflow, x - LSE counts as 80 there
if it is more, on every backend.
"""

import math

import torch
from torch import Tensor

from empcause.ops.philox import dropout_keep_mask

# Rounding may leave a weight that is meant to be 0 slightly below it.
SMALLEST_WEIGHT = -1e-6
# The power of two of larger weights is kept apart.
LARGE_WEIGHT = 2.0**32
# The largest x - LSE that counts where the weight is 0.
LARGEST_EXPONENT = 80.0


def key_weights(
    cause: Tensor | None, strength: float | Tensor, key_mask: Tensor | None, batch: int, keys: int, like: Tensor
) -> Tensor:
    """Returns the weight of every key: `key_mask * (1 + strength * cause)`, values in [-1e-6, 0) counting as 0.

    Args:
        cause: `[B or 1, K]` or `[B or 1, H or 1, K]`, or None.
        strength: a number, or `[H]`.
        key_mask: `[B, K]` bool, or None.
        batch, keys: B and K.
        like: gives device and computing dtype.

    Returns:
        `[B or 1, H or 1, K]`.
    """
    weight = like.new_ones((1, 1, keys))
    if cause is not None:
        cause = cause.to(like.dtype)
        cause = cause[:, None] if cause.dim() == 2 else cause
        factor = strength.to(like.dtype)[:, None] if isinstance(strength, Tensor) else strength
        # The cause of a masked key, NaN included, has no effect.
        product = factor * (cause if key_mask is None else torch.where(key_mask[:, None], cause, 0.0))
        weight = 1 + product
        weight = torch.where((weight < 0) & (weight >= SMALLEST_WEIGHT), weight - weight.detach(), weight)
    if key_mask is not None:
        weight = torch.where(key_mask[:, None], weight, 0.0)
    return weight


def biased_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cause: Tensor | None = None,
    *,
    strength: float | Tensor = 1.0,
    key_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    query_offset: int | Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes biased attention as the equations say, differentiable by autograd, on any device, in fp64 too.

    Args:
        query: `[B, H, Q, D]`.
        key, value: `[B, Hkv, K, D]`.
        cause, strength, key_mask, causal, scale, dropout_p, seed, query_offset: see `empcause.biased_attention`.
        keep: `[B, H, Q, K]` bool, the probabilities that survive dropout; default is what `seed` decides.

    Returns:
        Output `[B, H, Q, D]` in query's dtype, and the log-sum-exp `[B, H, Q]` of the weighted sum, +inf for rows without a
        key. fp64 inputs are computed in fp64, others in fp32.
    """
    batch, heads, queries, dim = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = dim**-0.5 if scale is None else scale
    like = torch.empty((), dtype=compute, device=query.device)
    weight = key_weights(cause, strength, key_mask, batch, keys, like)
    weight = weight.expand(batch, heads, keys)[:, :, None]

    present = (
        torch.ones_like(weight, dtype=torch.bool) if key_mask is None else key_mask[:, None, None].expand_as(weight)
    )
    allowed, counted = weight > 0, present  # a key of weight 0 that is not masked still has a gradient of its weight
    if causal:
        offset = keys - queries if query_offset is None else query_offset
        position = torch.arange(queries, device=query.device)[:, None] + offset
        past = torch.arange(keys, device=query.device) <= position
        allowed, counted = allowed & past, counted & past

    def sanitised(x: Tensor) -> Tensor:
        """Returns keys or values in which neither a masked key nor NaN in a key of weight 0 can reach a result."""
        x = x.to(compute).repeat_interleave(group, 1)
        x = torch.where(present[:, :, 0, :, None], x, 0.0)
        return torch.where(weight[:, :, 0, :, None] > 0, x, torch.nan_to_num(x, 0.0, 0.0, 0.0))

    logits = (query.to(compute) @ sanitised(key).transpose(-1, -2)) * scale
    # The weight is fraction * 2 ** power.
    power = torch.where(weight >= LARGE_WEIGHT, weight.detach().clamp(min=1.0).log2().floor(), 0.0)
    fraction = weight * torch.exp2(-power)
    exponent = logits + power * math.log(2)
    masked = torch.where(allowed, exponent, float("-inf"))
    maximum = masked.detach().amax(-1, keepdim=True) if keys else logits.new_full((batch, heads, queries, 1), -math.inf)
    maximum = torch.where(maximum == float("-inf"), 0.0, maximum)
    log_total = (fraction * torch.exp(masked - maximum)).detach().sum(-1, keepdim=True).log()
    exponent = torch.where(counted, exponent - maximum, float("-inf"))
    # Neither clamp nor minimum, which let no gradient of a NaN through.
    exponent = torch.where(exponent > log_total + LARGEST_EXPONENT, log_total + LARGEST_EXPONENT, exponent)
    weighted = torch.where(counted, fraction * torch.exp(exponent), 0.0)
    total = weighted.sum(-1, keepdim=True)
    alive = total != 0  # a NaN among what is attended to shows, as in the kernels
    probability = weighted / torch.where(alive, total, 1.0)
    if dropout_p > 0:
        if keep is None:
            assert seed is not None
            keep = dropout_keep_mask(seed, dropout_p, batch, heads, queries, keys, query.device)
        probability = probability * keep / (1 - dropout_p)
    output = torch.where(alive, probability @ sanitised(value), 0.0)
    logsumexp = torch.where(alive, maximum + torch.log(torch.where(alive, total, 1.0)), float("inf"))
    return output.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2), logsumexp[..., 0]
