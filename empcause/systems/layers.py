"""Layers and losses that the word-level systems share."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def sinusoids(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Positions as sines and cosines of geometrically spaced frequencies.

    Args:
        length: number of positions.
        width: size of a position's vector, even and at least 4.
        device: where the result is made.

    Returns:
        `[length, width]` float32: in the first half `sin(p * 10^(-4 i / (width/2 - 1)))` for `i = 0, ..., width/2 - 1`, in the
        second half the cosines.
    """
    half = width // 2
    frequencies = torch.logspace(0, -4, half, device=device, dtype=torch.float64)
    angles = torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1).float()


class Attention(nn.Module):
    """Multi-head attention whose projections have no bias and may be of another width than the states.

    Logits are scaled by the inverse square root of a head's size.

    Args:
        width: size of the states.
        inner: size of queries, keys and values over all heads.
        num_heads: number of heads, which divides `inner`.
        dropout: probability with which an attention weight is dropped in training.
    """

    def __init__(self, width: int, inner: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)

    def forward(
        self, states: Tensor, memory: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Let states attend to a memory.

        Args:
            states: `[B, Q, width]` what the queries are made of.
            memory: `[B, K, width]` what keys and values are made of; None: the states themselves.
            mask: `[B, K]` bool, True where a key may be attended; every row needs one. None: all may.
            causal: a state sees itself and those before it alone; not together with `mask`.

        Returns:
            `[B, Q, width]`.
        """
        memory = states if memory is None else memory
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query(states), self.key(memory), self.value(memory))
        )
        attended = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else mask[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return self.output(attended.transpose(1, 2).flatten(2))

    def logits(self, states: Tensor, memory: Tensor) -> Tensor:
        """The attention's logits, not masked: `[B, num_heads, Q, K]`, for what is read of them beside the attention itself.

        Args:
            states, memory: as for `forward`.
        """
        query, key = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.query(states), self.key(memory))
        )
        return query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])


def smoothed_cross_entropy(
    log_probs: Tensor, targets: Tensor, pad_token_id: int, vocab_size: int, smoothing: float = 0.1
) -> Tensor:
    """Cross-entropy to a target that has `1 - smoothing` on its token and the rest spread over the other words.

    Args:
        log_probs: `[N, W]` with `W >= vocab_size`; columns from `vocab_size` on are words of the texts outside of the vocabulary.
        targets: `[N]` int64 tokens below W, none of them padding.
        pad_token_id: the column that gets nothing.
        vocab_size: number of words of the vocabulary, padding included. The rest is spread evenly over these without
            `pad_token_id` and the target.
        smoothing: the share that is spread.

    Returns:
        `[N]`, in nats.
    """
    known = log_probs[:, :vocab_size]
    on_target = log_probs.gather(1, targets[:, None])[:, 0]
    inside = targets < vocab_size
    others = known.sum(1) - known[:, pad_token_id] - torch.where(inside, on_target, 0)
    spread = smoothing / (vocab_size - 1 - inside.to(log_probs.dtype))
    return -((1 - smoothing) * on_target + spread * others)


def smoothing_entropy(vocab_size: int, smoothing: float = 0.1) -> float:
    """Entropy in nats of the target of `smoothed_cross_entropy` for a token of the vocabulary.

    The cross-entropy minus this is the Kullback-Leibler divergence from the target.
    """
    if not smoothing:
        return 0.0
    return -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(smoothing / (vocab_size - 2))
