"""Batches: what stands where an item is shorter, and which items come together."""

from itertools import pairwise

import numpy as np
import pytest

from empcause.data.batching import TokenBatchSampler, length_batches
from empcause.data.collation import PackedSizes, pack_batch, packed_sizes, pad_batch

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


def packable(number, seed=0, longest=40):
    """Items of random lengths with roles, labels and causes; the last tokens of each are labelled."""
    random = np.random.default_rng(seed)
    items = []
    for length in random.integers(2, longest + 1, number):
        ids = random.integers(0, 97, length)
        answer = np.arange(length) >= random.integers(1, length)
        causes = np.where(answer, 0, random.random(length)).astype(np.float32)
        items.append(
            {"input_ids": ids, "token_type_ids": answer.astype(np.int64), "labels": np.where(answer, ids, -100)}
            | {"cause_probs": causes}
        )
    return items


def lengths_of(items):
    return [len(item["input_ids"]) for item in items]


class TestPackedBatches:
    def test_every_item_is_a_sequence_of_its_own_and_padding_is_labelled_nowhere(self):
        items = packable(7)
        items[2]["labels"] = items[2]["input_ids"]  # its first token, too, which nothing predicts
        sizes = PackedSizes(tokens=(64, 256), labels=(64, 128), sequences=12, longest=40)
        batch = pack_batch(items, 99, sizes)
        total = sum(lengths_of(items))
        assert 64 < total < 256
        starts = batch["cu_seq_lens_q"].tolist()
        assert starts[: len(items) + 1] == np.cumsum([0, *lengths_of(items)]).tolist()
        assert (starts[-1], len(starts)) == (256, 13)
        assert max(np.diff(starts)) <= 40
        for name, fill in (("input_ids", 99), ("token_type_ids", 0), ("cause_probs", 0)):
            assert batch[name].shape == (1, 256)
            assert batch[name][0, :total].tolist() == np.concatenate([item[name] for item in items]).tolist()
            assert (batch[name][0, total:] == fill).all()
        assert batch["position_ids"][0].tolist() == [i for a, b in pairwise(starts) for i in range(b - a)]
        labels = np.concatenate([[-100, *item["labels"][1:]] for item in items])
        assert batch["labels"][0].tolist() == [*labels, *[-100] * (256 - total)]
        kept, shifted = batch["logits_to_keep"].numpy(), batch["shift_labels"][0].numpy()
        assert len(kept) == len(shifted) == len(set(kept)) == 128
        counted = shifted != -100
        assert kept[counted].tolist() == (np.flatnonzero(labels != -100) - 1).tolist()
        assert shifted[counted].tolist() == labels[labels != -100].tolist()

    @pytest.mark.parametrize("batch_size", [1, 2, 8, 16])
    def test_sizes_are_few_and_waste_little(self, batch_size):
        items = packable(160, longest=120)
        sampler = TokenBatchSampler(lengths_of(items), 0, batch_size=batch_size)
        sizes = packed_sizes(sampler.tokens, sampler.items, max(lengths_of(items)))
        assert len(sizes.tokens) <= 10
        assert len(sizes.labels) <= 6
        for epoch in range(2):
            sampler.set_epoch(epoch)
            for batch in sampler:
                packed = pack_batch([items[index] for index in batch], 0, sizes)
                tokens, labels = packed["labels"].numel(), packed["shift_labels"].numel()
                assert (tokens, labels) in {(a, min(a, b)) for a in sizes.tokens for b in sizes.labels}
                assert packed["cu_seq_lens_k"].shape == (sizes.sequences + 1,)
                used = sum(lengths_of([items[index] for index in batch]))
                assert tokens - used < max(0.2 * tokens, sizes.tokens[-1] / 8) + 64
        if batch_size >= 8:
            assert len(sizes.tokens) == 1
            assert sampler.tokens.sum() > 0.85 * sizes.tokens[0] * len(sampler)

    def test_what_does_not_fit_is_refused(self):
        items = packable(4)
        for sizes, message in [
            (PackedSizes((64,), (64,), 9, 40), "tokens, more than the largest size, 64"),
            (PackedSizes((256,), (16,), 9, 40), "labels, more than the largest size, 16"),
            (PackedSizes((256,), (256,), 4, 40), "sequences of at most 40 tokens do not fit into 4"),
            (PackedSizes((256,), (256,), 90, 9), "do not fit into 90 of 9"),
        ]:
            with pytest.raises(ValueError, match=message):
                pack_batch(items, 0, sizes)
