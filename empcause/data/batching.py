"""Batches of texts of similar length: from the shortest on, or in an order that depends on seed and epoch alone."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

# Texts are shuffled, then sorted by length within windows of this many batches.
_WINDOW = 20


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Put the indices of items into batches of similar length, the shortest first; items of equal length keep their order.

    Args:
        lengths: `[n]` number of tokens (or characters) per item.
        batch_size: items per batch; the last batch may have fewer.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class LengthBatchSampler(Sampler[list[int]]):
    """Yields batches of indices of items of similar length, which need little padding, in a random but repeatable order.

    Args:
        lengths: `[n]` number of tokens per item.
        batch_size: items per batch (the last of a phase may have fewer).
        seed: the order depends on it and on the epoch.
        phases: index sets trained one after another within each epoch; default is one phase with everything.
        drop_last: leave out batches with fewer than `batch_size` items.
    """

    # None tells accelerate that batches vary in size when it distributes them over processes.
    batch_size = None

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        phases: Sequence[Sequence[int]] | None = None,
        drop_last: bool = False,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.items_per_batch = batch_size
        self.seed = seed
        self.phases = [np.asarray(phase) for phase in (phases or [range(len(lengths))]) if len(phase)]
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, on which the order of the batches depends."""
        self.epoch = epoch

    def __len__(self) -> int:
        size = self.items_per_batch
        return sum(len(phase) // size if self.drop_last else -(-len(phase) // size) for phase in self.phases)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        for phase in self.phases:
            order = random.permutation(phase)
            batches: list[list[int]] = []
            window = self.items_per_batch * _WINDOW
            for start in range(0, len(order), window):
                part = order[start : start + window]
                part = part[np.argsort(self.lengths[part], kind="stable")]
                batches += [
                    part[place : place + self.items_per_batch].tolist()
                    for place in range(0, len(part), self.items_per_batch)
                    if len(part) - place >= self.items_per_batch or not self.drop_last
                ]
            for index in random.permutation(len(batches)):
                yield batches[index]
