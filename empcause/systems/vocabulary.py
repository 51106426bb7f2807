"""Word-level tokenizers for systems with a vocabulary of their own, and word vectors from files."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from empcause.data.words import WORD_PATTERN
from empcause.errors import UserError
from empcause.text import one_line

# The vocabulary is cut by counts, never by size.
_NO_LIMIT = 2**31


class Words(NamedTuple):
    """The words of a text as a word-level tokenizer sees them.

    Attributes:
        words: the words, lower-cased.
        ids: the token id of each word, that of the unknown token for words outside of the vocabulary.
        spans: the character span `(start, end)` of each word in the text.
    """

    words: list[str]
    ids: list[int]
    spans: list[tuple[int, int]]


def train_word_tokenizer(
    texts: Iterable[str], special_tokens: Mapping[str, str], min_count: int = 2
) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the lower-cased words of `empcause.data.split_words`.

    Args:
        texts: the texts that give the vocabulary.
        special_tokens: tokens that get the first ids, in order, by the attribute that transformers has for them ("unk_token"
            and "pad_token" are needed); `convert_tokens_to_ids` finds those with names of another kind.
        min_count: words that occur less often are left out.

    Returns:
        The tokenizer, which `save_pretrained` writes. It adds no special tokens to a text and joins words by one space.

    Raises:
        UserError: no word occurs often enough.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=special_tokens["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"(?i){WORD_PATTERN}"), "removed", invert=True)
    specials = list(special_tokens.values())
    trainer = trainers.WordLevelTrainer(
        vocab_size=_NO_LIMIT, min_frequency=min_count, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == len(specials):
        raise UserError(f"No word occurs {min_count} times in the training data; give more --data.")
    named = {name: token for name, token in special_tokens.items() if name in _ATTRIBUTES}
    others = [token for name, token in special_tokens.items() if name not in _ATTRIBUTES]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=others,
        clean_up_tokenization_spaces=False,
        **named,  # type: ignore[arg-type]
    )


_ATTRIBUTES = ("unk_token", "pad_token", "bos_token", "eos_token", "cls_token", "sep_token")


def encode_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Words]:
    """Split texts into words and look them up; what is written like a special token is an ordinary word.

    Args:
        tokenizer: a tokenizer of `train_word_tokenizer`.
        texts: raw texts.
    """
    encodings = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        split_special_tokens=True,
    )
    found = []
    for text, ids, spans in zip(texts, encodings["input_ids"], encodings["offset_mapping"], strict=True):
        found.append(Words([text[start:end].lower() for start, end in spans], ids, spans))
    return found


def load_vectors(
    path: str | os.PathLike[str], vocabulary: Mapping[str, int], width: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Load the vectors of a vocabulary's words.

    Args:
        path: a text file with a word and its numbers on each line, as GloVe's (a first line of two numbers, as word2vec's, is
            passed over), or an array `NAME.npy` `[N, width]` beside a file `NAME.txt` with one word a line.
        vocabulary: ids by word.
        width: size of the vectors.

    Returns:
        `[n]` int64 ids of the words that have a vector, and their vectors `[n, width]` float32.

    Raises:
        UserError: a file is missing or malformed, has vectors of another size, or has none of the words.
    """
    file = Path(path)
    try:
        pairs = _array_vectors(file) if file.suffix == ".npy" else _text_vectors(file, vocabulary)
    except (OSError, ValueError) as error:
        raise UserError(f"The word vectors in {file} cannot be read: {one_line(error)}") from error
    found: dict[int, NDArray[np.float32]] = {}
    for word, vector in pairs:
        if word not in vocabulary:
            continue
        if vector.shape != (width,) or not np.isfinite(vector).all():
            what = f"{vector.size} numbers" if vector.shape != (width,) else "numbers that are not finite"
            raise UserError(f"The vector of {word!r} in {file} has {what}; expected {width} finite ones.")
        found.setdefault(vocabulary[word], vector)
    if not found:
        raise UserError(f"{file} has no vector of any word of the training data; give other word vectors.")
    return np.array(list(found), np.int64), np.stack(list(found.values()))


def _array_vectors(file: Path) -> list[tuple[str, NDArray[np.float32]]]:
    array = np.load(file, allow_pickle=False)
    words = file.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    if array.ndim != 2 or len(array) != len(words):
        raise ValueError(f"its shape is {array.shape}, but {file.with_suffix('.txt').name} has {len(words)} words.")
    return list(zip(words, array.astype(np.float32), strict=True))


def _text_vectors(file: Path, vocabulary: Mapping[str, int]) -> list[tuple[str, NDArray[np.float32]]]:
    found = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            word, *values = line.rstrip().split(" ")
            if number == 1 and len(values) == 1:
                continue
            if not values:
                raise ValueError(f"line {number} has no numbers.")
            if word in vocabulary:
                found.append((word, np.array(values, np.float32)))
    return found
