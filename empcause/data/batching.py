"""Batches of texts: of similar length, or of nearly the same number of tokens each, in an order that seed and epoch decide."""

import heapq
import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
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


class EpochBatchSampler(Sampler[list[int]]):
    """Yields batches of indices of items in a random order that depends on a seed and on the epoch alone.

    Args:
        lengths: `[n]` number of tokens per item.
        seed: seed of the order.
    """

    # None tells accelerate that batches vary in size when it distributes them over processes.
    batch_size = None

    def __init__(self, lengths: Sequence[int], seed: int) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, on which the order of the batches depends."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches, the same in every epoch."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        return self.draw(np.random.default_rng((self.seed, self.epoch)))

    def draw(self, random: np.random.Generator) -> Iterator[list[int]]:
        """Yield the batches of an epoch, which `random` decides."""
        raise NotImplementedError


class LengthBatchSampler(EpochBatchSampler):
    """Yields batches of items of similar length, which need little padding.

    Args:
        lengths: `[n]` number of tokens per item.
        batch_size: items per batch (the last of a phase may have fewer).
        seed: the order depends on it and on the epoch.
        phases: index sets trained one after another within each epoch; default is one phase with everything.
        drop_last: leave out batches with fewer than `batch_size` items.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        phases: Sequence[Sequence[int]] | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(lengths, seed)
        self.items_per_batch = batch_size
        self.phases = [np.asarray(phase) for phase in (phases or [range(len(lengths))]) if len(phase)]
        self.drop_last = drop_last

    def __len__(self) -> int:
        size = self.items_per_batch
        return sum(len(phase) // size if self.drop_last else -(-len(phase) // size) for phase in self.phases)

    def draw(self, random: np.random.Generator) -> Iterator[list[int]]:
        """Yield the batches of one phase after another."""
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


class PaddedBatchSampler(EpochBatchSampler):
    """Yields batches of items of similar length, with a limit for their number of tokens when they are padded.

    In every epoch there are the same lengths in each batch, but other items of these lengths.

    Args:
        lengths: `[n]` number of tokens per item.
        seed: the order depends on it and on the epoch.
        max_tokens: greatest size of a batch: its number of items times the length of the longest one.

    Raises:
        ValueError: an item is longer than `max_tokens`.
    """

    def __init__(self, lengths: Sequence[int], seed: int, max_tokens: int) -> None:
        super().__init__(lengths, seed)
        ascending = np.sort(self.lengths).tolist()
        if ascending and ascending[-1] > max_tokens:
            raise ValueError(f"an item has {ascending[-1]} tokens, more than max_tokens = {max_tokens}.")
        self._starts = [0] if ascending else []
        for place, length in enumerate(ascending):
            if (place - self._starts[-1] + 1) * length > max_tokens:
                self._starts.append(place)

    def __len__(self) -> int:
        return len(self._starts)

    def draw(self, random: np.random.Generator) -> Iterator[list[int]]:
        """Yield the batches; which items of a length are in which batch, and the batches' order, is random."""
        order = random.permutation(len(self.lengths))
        order = order[np.argsort(self.lengths[order], kind="stable")]
        batches = np.split(order, self._starts[1:])
        for index in random.permutation(len(self)):
            yield batches[index].tolist()


class TokenBatchSampler(EpochBatchSampler):
    """Yields batches with nearly the same number of tokens, made of items of all lengths, for packing without padding.

    In every epoch there are the same lengths in each batch, but other items of these lengths. The number of batches and what
    their packing needs are therefore known before the first epoch.

    Args:
        lengths: `[n]` number of tokens per item.
        seed: the order depends on it and on the epoch.
        batch_size: greatest number of items per batch: as few batches as it allows, with this many items or one fewer (in small
            sets a few batches may have still fewer). None: no limit.
        max_tokens: greatest number of tokens per batch: about as few batches as it allows. None: no limit.
        drop_last: leave out batches with fewer than `batch_size` items.

    Attributes:
        items: `[batches]` number of items of each batch, int64.
        tokens: `[batches]` number of tokens of each batch, int64.

    Raises:
        ValueError: an item is longer than `max_tokens`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seed: int,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(lengths, seed)
        descending = -np.sort(-self.lengths)
        number = math.ceil(len(descending) / (batch_size or max(1, len(descending))))
        self._batch_of = _deal(descending, number, batch_size)
        if max_tokens is not None:
            if len(descending) and descending[0] > max_tokens:
                raise ValueError(f"an item has {descending[0]} tokens, more than max_tokens = {max_tokens}.")
            while (largest := self._per_batch(descending).max(initial=0)) > max_tokens:
                number = max(number + 1, math.ceil(number * largest / max_tokens))
                self._batch_of = _deal(descending, number, batch_size)
        self.items, self.tokens = self._per_batch(np.ones_like(descending)), self._per_batch(descending)
        self._kept = np.flatnonzero(self.items >= (batch_size or 1 if drop_last else 1))
        self.items, self.tokens = self.items[self._kept], self.tokens[self._kept]

    def __len__(self) -> int:
        return len(self._kept)

    def draw(self, random: np.random.Generator) -> Iterator[list[int]]:
        """Yield the batches; which items of a length are in which batch, and the batches' order, is random."""
        order = random.permutation(len(self.lengths))
        order = order[np.argsort(-self.lengths[order], kind="stable")]
        places = np.argsort(self._batch_of, kind="stable")
        batches = np.split(order[places], np.cumsum(np.bincount(self._batch_of))[:-1])
        for index in random.permutation(self._kept):
            yield batches[index].tolist()

    def _per_batch(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(self._batch_of, values).astype(np.int64)


def _deal(lengths: NDArray[np.int64], number: int, batch_size: int | None) -> NDArray[np.int64]:
    """Deal items to batches, each to the batch with the fewest tokens that has room (longest processing time first).

    Args:
        lengths: `[n]` number of tokens per item, the longest first.
        number: number of batches.
        batch_size: greatest number of items per batch; None is no limit.

    Returns:
        `[n]` int64, the batch of each item.
    """
    batches = [(0, batch, 0) for batch in range(number)]  # a heap of tokens, batch and items
    found = np.empty(len(lengths), np.int64)
    for place, length in enumerate(lengths.tolist()):
        tokens, batch, items = batches[0]
        found[place] = batch
        if items + 1 == batch_size:
            heapq.heappop(batches)
        else:
            heapq.heapreplace(batches, (tokens + length, batch, items + 1))
    return found
