"""Batches that fill the last step of an epoch, so that several processes train on what one process would."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from empcause.data.sequences import IGNORED


class FilledBatches(Sampler[list[int]]):
    """Yields a sampler's batches, and then the first ones again without labels until each process has the same number.

    Processes take the batches in turn. Without these, accelerate would repeat the first batches with their labels, which would
    count twice. An index is written as its bitwise complement where the labels are to be left out; `FilledDataset` reads it.

    Args:
        batches: the sampler.
        processes: number of processes.
    """

    # None tells accelerate that batches vary in size when it distributes them over processes.
    batch_size = None

    def __init__(self, batches: Sampler[list[int]], processes: int) -> None:
        self.batches = batches
        self.processes = processes

    def __len__(self) -> int:
        """Number of batches, a multiple of the number of processes."""
        number = len(self.batches)  # type: ignore[arg-type]
        return number + -number % self.processes

    def __iter__(self) -> Iterator[list[int]]:
        first: list[list[int]] = []
        for batch in self.batches:
            if len(first) < self.processes:
                first.append(batch)
            yield batch
        for place in range(len(self) - len(self.batches)):  # type: ignore[arg-type]
            yield [~index for index in first[place % len(first)]]


class FilledDataset(Dataset[Mapping[str, Any]]):
    """Gives the items of a data set, without their labels where an index is the bitwise complement of an item's.

    Args:
        items: mappings that may have `labels`, `emotion_labels`, `cause_labels` and `automatic`.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if index >= 0:
            return self.items[index]
        item = self.items[~index]
        names = [name for name in ("labels", "emotion_labels", "cause_labels") if name in item]
        without = {name: np.full_like(item[name], IGNORED)[()] for name in names}
        return {**item, **without, **({"automatic": False} if "automatic" in item else {})}
