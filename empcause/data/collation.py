"""Batches of encoded texts and dialogues."""

from collections.abc import Mapping, Sequence
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
    batch: dict[str, Tensor] = {}
    for name, (fill, dtype) in ({"input_ids": (pad_token_id, np.int64)} | _FILLS).items():
        if any(name in item for item in items):
            padded: NDArray[Any] = np.full((len(items), longest), fill, dtype)
            for row, item in zip(padded, items, strict=True):
                if name in item:
                    length = len(item[name])
                    row[longest - length if side == "left" else 0 :][:length] = item[name]
            batch[name] = torch.from_numpy(padded)
    for name in _STACKED:
        if name in items[0]:
            batch[name] = torch.tensor([item[name] for item in items])
    lengths = torch.tensor([len(item["input_ids"]) for item in items])[:, None]
    position = torch.arange(longest)
    batch["attention_mask"] = (position >= longest - lengths if side == "left" else position < lengths).long()
    return batch
