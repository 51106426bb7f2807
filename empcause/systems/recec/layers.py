"""Stand-ins for the layers that word-level systems share."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head attention without biases, over torch's SDPA."""

    def __init__(self, size: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = (nn.Linear(size, width, bias=False) for _ in range(3))
        self.output = nn.Linear(width, size, bias=False)

    def forward(self, hidden: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Attend."""

        def split(states: Tensor) -> Tensor:
            return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = split(self.query(hidden)), split(self.key(memory)), split(self.value(memory))
        rate = self.dropout if self.training else 0.0
        found = functional.scaled_dot_product_attention(query, key, value, mask, rate)
        return self.output(found.transpose(1, 2).flatten(-2))


def sinusoids(length: int, size: int) -> Tensor:
    """Positions."""
    half = size // 2
    rates = 10 ** (-4 * torch.arange(half) / (half - 1))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), -1)


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float, pad: int) -> Tensor:
    """Smoothed cross-entropy per row."""
    logs = logits.log_softmax(-1)
    nll = -logs.gather(-1, targets[:, None])[:, 0]
    others = logs[:, pad] - logs.sum(-1) - nll
    return (1 - smoothing) * nll + smoothing / (logits.shape[-1] - 2) * others
