"""Shapes of attention that are timed."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One shape. Attention is causal, the last query aligned with the last key.

    Attributes:
        name: in the results.
        batch, heads, key_heads, queries, keys, dim: sizes of the tensors; `keys` is the longest sequence.
        dtype: of query, key and value.
        dropout_p: dropout of attention probabilities.
        padded: sequences of several lengths, padded on the right.
        packed: the same sequences one after another, without padding.
        mixed: those lengths, one for each of the batch; empty: falling evenly from the longest to a quarter of it.
    """

    name: str
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    dropout_p: float = 0.0
    padded: bool = False
    packed: bool = False
    mixed: tuple[int, ...] = ()

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        """Name and dtype: the case in the results."""
        return f"{self.name}, {self.dtype_name}"

    @property
    def lengths(self) -> list[int]:
        """Keys of each sequence."""
        if not (self.padded or self.packed):
            return [self.keys] * self.batch
        if self.mixed:
            return list(self.mixed)
        return [self.keys - 3 * self.keys * index // (4 * max(1, self.batch - 1)) for index in range(self.batch)]

    @property
    def decoding(self) -> bool:
        """One query over a cache: there is no backward pass to time."""
        return self.queries == 1 < self.keys

    def flops(self, direction: str) -> float:
        """Return the multiplications and additions of the matrix products, over the visible logits of real tokens.

        The forward pass has two products; the backward pass counts five, as in published figures.
        """
        logits = 0
        for length in self.lengths:
            queries = min(self.queries, length)
            logits += queries * (length - queries) + queries * (queries + 1) // 2
        return 4 * self.dim * self.heads * logits * {"forward": 1.0, "backward": 2.5}.get(direction, 3.5)

    def bytes(self, direction: str) -> int:
        """Return the bytes of the tensors that have to be read and written, without padding.

        The forward pass reads query, key and value and writes the output; the backward pass reads these and the output's
        gradient, and writes three gradients.
        """
        queries = sum(min(self.queries, length) for length in self.lengths)
        rows = 2 * self.heads * queries + 2 * self.key_heads * sum(self.lengths)
        return rows * self.dim * self.dtype.itemsize * (1 if direction == "forward" else 3)


# By suite, for GPUs, each in every dtype. The most important come first.
GPU_SUITES: dict[str, list[Case]] = {
    "lengths": [
        Case("GPT-2 8x12x1024x64", 8, 12, 12, 1024, 1024, 64),
        Case("long 4x32x4096x64", 4, 32, 32, 4096, 4096, 64),
    ],
    "dialogues": [
        Case("dialogues 16x12x256x64, padded", 16, 12, 12, 256, 256, 64, padded=True),
        Case("dialogues 16x12x256x64, packed", 16, 12, 12, 256, 256, 64, packed=True),
    ],
    "decoding": [
        Case("decode 16x12x1/4096x64", 16, 12, 12, 1, 4096, 64),
        Case("decode grouped 8x32/8x1/8192x128", 8, 32, 8, 1, 8192, 128),
    ],
    "shapes": [
        Case("grouped 4x32/8x2048x128", 4, 32, 8, 2048, 2048, 128),
        Case("wide 4x8x2048x256", 4, 8, 8, 2048, 2048, 256),
        Case("head size 8x12x1024x32", 8, 12, 12, 1024, 1024, 32),
        Case("head size 8x12x1024x96", 8, 12, 12, 1024, 1024, 96),
    ],
    "dropout": [Case("GPT-2 8x12x1024x64, dropout", 8, 12, 12, 1024, 1024, 64, dropout_p=0.1)],
}

# So small that the host's time is all there is.
TINY = [
    Case("tiny 1x12x64x64", 1, 12, 12, 64, 64, 64),
    Case("tiny 2x12x64x64, with key_mask", 2, 12, 12, 64, 64, 64, padded=True),
    Case("tiny 1x12x64x64, dropout", 1, 12, 12, 64, 64, 64, dropout_p=0.1),
    Case("tiny 2x12x64x64, packed", 2, 12, 12, 64, 64, 64, packed=True),
]
