"""Encoding texts for the extractor: token ids, and the word that each token belongs to."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from empcause.data import Word, is_content_word


def encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, words: Sequence[Word], max_length: int
) -> dict[str, NDArray[np.int64]]:
    """Tokenize one text and find the word that each token belongs to.

    Args:
        tokenizer: a fast tokenizer (character offsets are needed).
        text: the raw text.
        words: its words.
        max_length: greatest number of tokens; the end of a longer text is cut off.

    Returns:
        int64 arrays: `input_ids` `[S]`, `special_tokens_mask` `[S]`, `offsets` `[S, 2]` (character spans, empty at special
        tokens), `word_index` `[S]` (index of the first word that the token overlaps, -1 for none), and `word_ids` `[S]` (like
        `word_index`, but -1 at stop words and punctuation).
    """
    encoded = tokenizer(
        text,
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        split_special_tokens=True,  # "</s>" in a text is spelled out and is not the token of this name
    )
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    word_index = first_overlap(offsets, words)
    content = np.array([*(is_content_word(word.text) for word in words), False])
    return {
        "input_ids": np.asarray(encoded["input_ids"], np.int64),
        "special_tokens_mask": np.asarray(encoded["special_tokens_mask"], np.int64),
        "offsets": offsets,
        "word_index": word_index,
        "word_ids": np.where(content[word_index], word_index, -1),
    }


def is_cut(item: dict[str, NDArray[np.int64]], text: str, max_length: int) -> bool:
    """Whether `encode_text` cut off the end of a text."""
    return len(item["input_ids"]) >= max_length and int(item["offsets"].max()) < len(text.rstrip())


def first_overlap(spans: NDArray[np.int64], words: Sequence[Word]) -> NDArray[np.int64]:
    """Index of the first word that each character span overlaps, -1 for none: `[n]` from `[n, 2]`."""
    if not words:
        return np.full(len(spans), -1, np.int64)
    starts = np.array([word.start for word in words])
    ends = np.array([word.end for word in words])
    overlap = np.maximum(spans[:, :1], starts) < np.minimum(spans[:, 1:], ends)
    return np.where(overlap.any(1), overlap.argmax(1), -1)
