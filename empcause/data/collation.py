"""Batches of encoded texts and dialogues."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from empcause.data.sequences import IGNORED

# Padding value and dtype of the entries with one value per token; input_ids are padded with the tokenizer's padding token.
_FILLS: dict[str, tuple[float, Any]] = {
    "token_type_ids": (0, np.int64),
    "labels": (IGNORED, np.int64),
    "cause_probs": (0.0, np.float32),
    "special_tokens_mask": (1, np.int64),
    "word_ids": (-1, np.int64),
    "cause_labels": (IGNORED, np.int64),
}
# Entries with one value per item.
_STACKED = ("emotion_labels", "automatic")


def pad_batch(items: Sequence[Mapping[str, Any]], pad_token_id: int, side: str = "right") -> dict[str, Tensor]:
    """Make a batch of items, padded to the longest of them.

    Args:
        items: mappings with `input_ids` `[S]` and further arguments of the model's `forward`: `[S]` arrays or single values.
            If only some items have an entry with one value per token, the others get its padding value, which means no label
            and no cause. Entries that no model takes are left out.
        pad_token_id: padding value of `input_ids`.
        side: "right" for training and scoring, "left" for generation.

    Returns:
        Tensors `[B, S]` (int64, `cause_probs` float32) and `[B]` of the same names, and `attention_mask` `[B, S]` int64.
    """
    longest = max(len(item["input_ids"]) for item in items)
    places = []
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        start = longest - length if side == "left" else 0
        places.append((row, slice(start, start + length)))
    batch = _place(items, pad_token_id, (len(items), longest), places)
    for name in _STACKED:
        if name in items[0]:
            batch[name] = torch.tensor([item[name] for item in items])
    lengths = torch.tensor([len(item["input_ids"]) for item in items])[:, None]
    position = torch.arange(longest)
    batch["attention_mask"] = (position >= longest - lengths if side == "left" else position < lengths).long()
    return batch


def _place(
    items: Sequence[Mapping[str, Any]], pad_token_id: int, shape: tuple[int, int], places: Sequence[tuple[int, slice]]
) -> dict[str, Tensor]:
    """Lay the items' values at their places in tensors of a shape, which are filled with padding elsewhere.

    Args:
        items, pad_token_id: as for `pad_batch`.
        shape: rows and tokens per row.
        places: row and tokens of each item.
    """
    batch = {}
    for name, (fill, dtype) in ({"input_ids": (pad_token_id, np.int64)} | _FILLS).items():
        if any(name in item for item in items):
            padded: NDArray[Any] = np.full(shape, fill, dtype)
            for place, item in zip(places, items, strict=True):
                if name in item:
                    padded[place] = item[name]
            batch[name] = torch.from_numpy(padded)
    return batch


@dataclass(frozen=True)
class PackedSizes:
    """Sizes to which packed batches are padded, so that few shapes occur in a training.

    Attributes:
        tokens: numbers of tokens, ascending.
        labels: numbers of labelled tokens, ascending; the last is not below the last of `tokens`.
        sequences: number of sequences, those of padding included.
        longest: greatest number of tokens of a sequence.
    """

    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    sequences: int
    longest: int


def packed_sizes(tokens: NDArray[np.int64], items: NDArray[np.int64], longest: int) -> PackedSizes:
    """Choose the sizes to which batches are padded when they are packed.

    The largest size is that of the largest batch. Each further size of tokens is about 0.8, and each further size of labels about
    0.7, of the next larger one, down to an eighth of the largest; all are multiples of 64. Therefore there are at most 10 sizes
    of tokens and 6 of labels. But for rounding, padding is at most a fifth of the tokens and three tenths of the labels, in a
    batch that has more than an eighth of the largest one's.

    Args:
        tokens: `[batches]` number of tokens of every batch.
        items: `[batches]` number of items of every batch.
        longest: greatest number of tokens of an item.
    """
    sizes = _steps(int(tokens.max()), 0.8)
    used = np.array(sizes)[np.searchsorted(sizes, tokens)]
    sequences = items - (tokens - used) // longest  # padding stands in sequences of its own, none longer than the items
    return PackedSizes(tuple(np.unique(used).tolist()), _steps(sizes[-1], 0.7), int(sequences.max()), longest)


def _steps(largest: int, ratio: float) -> tuple[int, ...]:
    """Multiples of 64 from an eighth of the largest up to the largest, each about `ratio` of the next, ascending."""
    steps, size = set(), float(largest)
    while size >= largest / 8:
        steps.add(-(-int(size) // 64) * 64)
        size *= ratio
    return tuple(sorted(steps))


def pack_batch(items: Sequence[Mapping[str, Any]], pad_token_id: int, sizes: PackedSizes) -> dict[str, Any]:
    """Make a batch of items that stand one after another in one row, padded to one of a few sizes.

    Padding tokens are sequences of their own, no label refers to them, and no item sees them.

    Args:
        items: mappings as for `pad_batch`, with `labels`; entries with one value per item are not supported.
        pad_token_id: padding value of `input_ids`.
        sizes: sizes to which tokens, labels and sequences are padded.

    Returns:
        The entries of `pad_batch` with one value per token, `[1, S]`; the label of each item's first token is -100, because no
        token before it predicts it. In the place of `attention_mask` there are, under the names that they have in transformers:

        - `position_ids` `[1, S]` int64, which start anew in each sequence;
        - `cu_seq_lens_q` and `cu_seq_lens_k` `[sizes.sequences + 1]` int32, where each sequence starts (the last ones are empty);
        - `max_length_q` and `max_length_k`, which are `sizes.longest`;
        - `logits_to_keep` `[L]` int64, the positions whose next token is labelled, followed by other positions;
        - `shift_labels` `[1, L]` int64, the labels of the tokens that follow these positions, followed by -100.

    Raises:
        ValueError: the items do not fit into the sizes.
    """
    lengths = [len(item["input_ids"]) for item in items]
    used = sum(lengths)
    total = _size_for("tokens", used, sizes.tokens)
    padding = [sizes.longest] * ((total - used) // sizes.longest) + [(total - used) % sizes.longest]
    lengths += [length for length in padding if length]
    if len(lengths) > sizes.sequences or max(lengths) > sizes.longest:
        raise ValueError(
            f"{len(lengths)} sequences of at most {max(lengths)} tokens do not fit into {sizes.sequences} of {sizes.longest}."
        )
    sums = np.full(sizes.sequences + 1, total, np.int32)
    sums[: len(lengths) + 1] = np.cumsum([0, *lengths])
    places = [(0, slice(start, end)) for start, end in pairwise(sums[: len(items) + 1].tolist())]
    batch: dict[str, Any] = _place(items, pad_token_id, (1, total), places)
    labels = batch["labels"][0].numpy()
    labels[sums[sums < total]] = IGNORED
    labelled = np.flatnonzero(labels != IGNORED)
    number = _size_for("labels", len(labelled), sizes.labels)
    # The other positions are distinct as well, so that no gradient is added twice to one place.
    others = np.setdiff1d(np.arange(total), labelled - 1, assume_unique=True)
    kept = np.concatenate([labelled - 1, others])[:number]
    shifted = np.full(len(kept), IGNORED, np.int64)
    shifted[: len(labelled)] = labels[labelled]
    positions = np.concatenate([np.arange(end - start) for start, end in pairwise(sums.tolist())])
    starts = torch.from_numpy(sums)
    batch |= {"position_ids": torch.from_numpy(positions)[None], "cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
    batch |= {"max_length_q": sizes.longest, "max_length_k": sizes.longest}
    batch |= {"logits_to_keep": torch.from_numpy(kept), "shift_labels": torch.from_numpy(shifted)[None]}
    return batch


def _size_for(what: str, number: int, sizes: Sequence[int]) -> int:
    """Return the smallest of ascending sizes that holds a number of tokens or labels."""
    for size in sizes:
        if number <= size:
            return size
    raise ValueError(f"a batch has {number} {what}, more than the largest size, {sizes[-1]}.")
