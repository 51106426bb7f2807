"""Tile sizes, warps and pipeline stages of every kernel, by architecture, head size and dtype.

What decides:

- Nothing spills. Registers are the scarce resource: a thread has 255 and an SM 65536, so blocks_per_sm is what registers leave.
  Dropout needs more of them (the bits, and two selections), hence tiles of its own.
- Double-buffered tiles: with 3 stages of the software pipeline keys and values are two tiles ahead; 2 stages buffer a tile once.
  Where some keys may be absent, the rows of values to load follow from weights that are loaded themselves: that loop's pipeline
  has two levels, and takes 2 * num_stages - 1 stages for as many buffers.
- A warp's share of the query rows (of the keys, where a program owns those). On sm_80 every warp reads all of the other operand
  from shared memory: with 16 rows that takes as long as the matrix instructions, with 32 half of it, so 4 warps on 128 rows where
  the registers last. sm_90's instructions take 64 rows of a group of 4 warps and read shared memory themselves; sm_100's take 128
  rows and keep their sums in tensor memory.
- Shared memory: 163 KiB per block on sm_80, 227 KiB on sm_90 and sm_100, 99 KiB on sm_86, sm_89 and sm_120.
- fp32 has no matrix instructions (TF32 would round to 10 bits): small tiles of multiply-adds.

benchmarks/results/resources.csv has the figures behind these choices.
"""

from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch


@dataclass(frozen=True)
class Configuration:
    """How a kernel is cut up.

    Attributes:
        block_m, block_n: query rows and keys of a tile.
        num_warps: of a program.
        blocks_per_sm: programs that are to run side by side on an SM.
        num_stages: of the software pipeline, where what is loaded does not follow from what is loaded itself.
    """

    block_m: int
    block_n: int
    num_warps: int
    blocks_per_sm: int = 1
    num_stages: int = 3

    @property
    def max_registers(self) -> int:
        """Registers of a thread, so that blocks_per_sm fit. ptxas spills where it has no limit, even if there are enough."""
        return min(255, 65536 // (32 * self.num_warps * self.blocks_per_sm) // 8 * 8)

    @cached_property
    def options(self) -> dict[str, int]:
        """Options of Triton's compiler."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}


# kernel -> architecture -> head size up to which it holds -> without dropout, with dropout.
_16_BIT = {
    "forward": {
        80: {
            64: (Configuration(128, 64, 4, 2), Configuration(128, 64, 8)),
            128: (Configuration(128, 32, 8), Configuration(128, 32, 8)),
            256: (Configuration(64, 32, 8), Configuration(64, 32, 8)),
        },
        90: {
            64: (Configuration(128, 64, 8, 2), Configuration(128, 64, 8)),
            128: (Configuration(128, 64, 8), Configuration(128, 64, 8)),
            256: (Configuration(128, 32, 8), Configuration(128, 32, 8)),
        },
        100: {
            64: (Configuration(128, 64, 8), Configuration(128, 64, 8)),
            128: (Configuration(128, 64, 8), Configuration(128, 64, 8)),
            256: (Configuration(128, 32, 8), Configuration(128, 32, 8)),
        },
    },
    "backward_keys": {
        80: {
            64: (Configuration(32, 64, 4, 2), Configuration(16, 128, 8)),
            128: (Configuration(32, 64, 8), Configuration(32, 32, 8)),
            256: (Configuration(32, 32, 8), Configuration(32, 32, 8)),
        },
        90: {
            64: (Configuration(64, 128, 8), Configuration(64, 128, 8)),
            128: (Configuration(32, 64, 8), Configuration(32, 128, 8)),
            256: (Configuration(64, 32, 8), Configuration(64, 32, 8)),
        },
        100: {
            64: (Configuration(64, 128, 8), Configuration(64, 128, 8)),
            128: (Configuration(64, 128, 8), Configuration(32, 128, 8)),
            256: (Configuration(32, 64, 8), Configuration(32, 64, 8, num_stages=2)),
        },
    },
    "backward_queries": {
        80: {
            64: (Configuration(128, 64, 8), Configuration(64, 32, 4, 2)),
            128: (Configuration(128, 32, 8), Configuration(64, 32, 4, 2)),
            256: (Configuration(64, 32, 8), Configuration(64, 32, 8)),
        },
        90: {
            64: (Configuration(128, 64, 8), Configuration(128, 64, 8)),
            128: (Configuration(128, 64, 8), Configuration(128, 32, 8)),
            256: (Configuration(64, 32, 8), Configuration(64, 16, 8, num_stages=2)),
        },
        100: {
            64: (Configuration(128, 64, 8), Configuration(128, 64, 8)),
            128: (Configuration(128, 64, 8), Configuration(128, 32, 8)),
            256: (Configuration(64, 32, 8), Configuration(64, 32, 8)),
        },
    },
}

# The same for every architecture: head size up to which it holds -> without dropout, with dropout. One stage where the addresses
# of several would not leave registers enough.
_FP32 = {
    "forward": {
        64: (Configuration(64, 32, 8, num_stages=1), Configuration(32, 32, 8)),
        128: (Configuration(32, 32, 8, num_stages=1), Configuration(32, 16, 8, num_stages=2)),
        256: (Configuration(16, 16, 8, num_stages=1), Configuration(16, 16, 8, num_stages=2)),
    },
    "backward_keys": {
        64: (Configuration(32, 32, 8, num_stages=1), Configuration(32, 32, 8, num_stages=1)),
        128: (Configuration(16, 32, 8, num_stages=1), Configuration(16, 16, 8, num_stages=1)),
        256: (Configuration(16, 16, 8, num_stages=1), Configuration(16, 16, 8, num_stages=1)),
    },
    "backward_queries": {
        64: (Configuration(64, 32, 8), Configuration(64, 32, 8, num_stages=1)),
        128: (Configuration(16, 16, 8, num_stages=1), Configuration(32, 32, 8, num_stages=1)),
        256: (Configuration(16, 16, 8), Configuration(16, 16, 8)),
    },
}

# Decoding is bound by memory: enough bytes in flight per SM, and rows no more than a matrix instruction's 16.
_DECODE_16_BIT = {64: Configuration(16, 64, 4, 3), 128: Configuration(16, 64, 4, 2), 256: Configuration(16, 32, 4, 2)}
_DECODE_FP32 = {64: Configuration(16, 64, 8), 128: Configuration(16, 32, 4, 2, 1), 256: Configuration(16, 16, 8, 1, 1)}


def block_d(head_dim: int) -> int:
    """Columns of a tile: the head size rounded up to a power of two that matrix instructions take."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def configuration(kernel: str, head_dim: int, dtype: torch.dtype, arch: int, dropout: bool = False) -> Configuration:
    """Return the configuration of a kernel.

    Args:
        kernel: "forward", "backward_keys", "backward_queries" or "decode".
        head_dim: up to 256.
        arch: compute capability times 10.
        dropout: whether the call drops probabilities.
    """
    size = next(size for size in (64, 128, 256) if head_dim <= size)
    is_fp32 = dtype == torch.float32
    if kernel == "decode":
        return (_DECODE_FP32 if is_fp32 else _DECODE_16_BIT)[size]
    if is_fp32:
        return _FP32[kernel][size][dropout]
    # sm_87 has sm_80's shared memory; what has less of it, or is newer than the table, takes the tiles of sm_80, buffered once.
    family = {80: 80, 87: 80, 90: 90, 100: 100, 103: 100}.get(arch)
    chosen = _16_BIT[kernel][family or 80][size][dropout]
    if family:
        return chosen
    fewer_rows = kernel == "backward_queries" and size == 256  # two operands of 64 rows alone would take 64 KiB
    return replace(chosen, num_stages=2, block_m=32 if fewer_rows else chosen.block_m)
