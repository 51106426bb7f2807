"""Batches of texts of similar length: from the shortest on, or in an order that depends on seed and epoch alone."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

# Texts are shuffled, then sorted by length within windows of this many batches.
_WINDOW = 20


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of items in batches of similar length, the shortest first; equal lengths stay in their order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class LengthBatchSampler(Sampler[list[int]]):
    """Yields lists of indices of similar length; little padding, an order that is random yet repeatable.

    Args:
        lengths: number of tokens per item.
        batch_size: items per batch (the last of a phase may have fewer).
        seed: with the epoch, decides the order.
        phases: index sets trained one after another within each epoch; default is one phase with everything.
        drop_last: leave out batches with fewer items; then processes get equal numbers of batches, too.
    """

    # accelerate shards batches of varying size over processes where this is None.
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
        """Choose the order of this epoch."""
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
