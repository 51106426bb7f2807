"""Batches: what stands where an item is shorter, and which items come together."""

import numpy as np
import pytest

from empcause.data.batching import length_batches
from empcause.data.collation import pad_batch

ITEM = {
    "input_ids": [5, 6],
    "token_type_ids": [1, 1],
    "labels": [7, 8],
    "cause_probs": np.array([0.5, 0.25], np.float32),
    "special_tokens_mask": [0, 0],
    "word_ids": [3, 4],
    "cause_labels": [1, 0],
}
FILLS = {
    "input_ids": 9,
    "token_type_ids": 0,
    "labels": -100,
    "cause_probs": 0,
    "special_tokens_mask": 1,
    "word_ids": -1,
    "cause_labels": -100,
}


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_counts_for_nothing_fills_shorter_items(side):
    longer = {name: np.repeat(value, 2) for name, value in ITEM.items()}
    batch = pad_batch([longer, ITEM], 9, side)
    assert batch.keys() == ITEM.keys() | {"attention_mask"}
    for name, fill in FILLS.items():
        own, rest = list(ITEM[name]), [fill] * 2
        assert batch[name][0].tolist() == list(longer[name])
        assert batch[name][1].tolist() == (rest + own if side == "left" else own + rest), name
    assert batch["attention_mask"].tolist() == [[1] * 4, [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]]


def test_values_per_item_are_stacked_and_what_no_model_takes_is_left_out():
    item = {"input_ids": [5], "emotion_labels": 3, "automatic": True, "offsets": np.zeros((1, 2)), "word_index": [0]}
    batch = pad_batch([item, item | {"automatic": False}], 0)
    assert batch.keys() == {"input_ids", "attention_mask", "emotion_labels", "automatic"}
    assert batch["emotion_labels"].tolist() == [3, 3]
    assert batch["automatic"].tolist() == [True, False]


def test_batches_from_the_shortest_on():
    assert length_batches([3, 1, 2, 1, 2], 2) == [[1, 3], [2, 4], [0]]
    assert length_batches([], 2) == []
