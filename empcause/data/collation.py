"""Batches of encoded dialogues."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from empcause.data.sequences import IGNORED


def pad_dialogues(items: Sequence[dict[str, Any]], pad_token_id: int, side: str = "right") -> dict[str, Tensor]:
    """Pad to the longest.

    Args:
        items: each with `input_ids`, `token_type_ids` (roles), and optionally `labels`, `cause_probs`, all `[S]`. Where some
            have `labels` or `cause_probs`, the others have none to count: -100 and 0.
        pad_token_id: fills `input_ids`.
        side: "right" for training and scoring, "left" for generation.

    Returns:
        `[B, S]` tensors of the same names, and `attention_mask`.
    """
    fills = {"input_ids": pad_token_id, "token_type_ids": 0, "labels": IGNORED, "cause_probs": 0.0}
    longest = max(len(item["input_ids"]) for item in items)
    batch: dict[str, Tensor] = {}
    for name, fill in fills.items():
        if any(name in item for item in items):
            dtype = np.float32 if name == "cause_probs" else np.int64
            padded = np.full((len(items), longest), fill, dtype)
            for row, item in zip(padded, items, strict=True):
                if name in item:
                    length = len(item[name])
                    row[longest - length if side == "left" else 0 :][:length] = item[name]
            batch[name] = torch.from_numpy(padded)
    lengths = torch.tensor([len(item["input_ids"]) for item in items])[:, None]
    position = torch.arange(longest)
    batch["attention_mask"] = (position >= longest - lengths if side == "left" else position < lengths).long()
    return batch
