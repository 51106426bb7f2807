"""Tile sizes, warps and pipeline stages of every kernel (first guess)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Configuration:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def block_d(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def configuration(kernel: str, head_dim: int, dtype: torch.dtype, arch: int, dropout: bool = False) -> Configuration:
    if kernel == "split":
        return Configuration(16, 64, 4, 3)
    if kernel == "delta":
        return Configuration(64, 0, 4, 1)
    if dtype == torch.float32:
        return Configuration(32, 32, 4, 1)
    return Configuration(64, 64, 4, 2)
