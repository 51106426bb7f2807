"""Word-level tokenizers, and word vectors from files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from empcause.data import load_dialogues, split_words
from empcause.errors import UserError
from empcause.systems.vocabulary import encode_words, load_vectors, train_word_tokenizer

SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "mark": "<mark>"}
TEXTS = ["The dog ran. The cat can't run!", "the dog <pad> SAT"]


def test_ids_special_tokens_and_counts(tmp_path):
    made = train_word_tokenizer(TEXTS, SPECIAL)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<unk>", "<pad>", "</s>", "<mark>"]
        assert (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert set(tokenizer.get_vocab()) == {*SPECIAL.values(), "the", "dog"}
        (found,) = encode_words(tokenizer, ["The Dog, <pad>"])
        assert found.words == ["the", "dog", ",", "<", "pad", ">"], "a written special token is text"
        assert found.ids == [*tokenizer.convert_tokens_to_ids(["the", "dog"]), 0, 0, 0, 0]
        assert found.spans == [(0, 3), (4, 7), (7, 8), (9, 10), (10, 13), (13, 14)]
        assert tokenizer.decode([*found.ids[:2], 3, 2], skip_special_tokens=True) == "the dog"
    assert len(train_word_tokenizer(TEXTS, SPECIAL, min_count=1)) > len(made)
    with pytest.raises(UserError, match="No word occurs 9 times in the training data"):
        train_word_tokenizer(TEXTS, SPECIAL, min_count=9)


@settings(deadline=None)
@given(st.text(st.sampled_from("aZé'’nNtTsSİ1_ .,\n!🏽👍\u200d\u00ad") | st.characters(max_codepoint=0x24F)))
def test_words_are_those_of_the_package(text):
    tokenizer = train_word_tokenizer(["a a"], SPECIAL)
    (found,) = encode_words(tokenizer, [text])
    words = split_words(text)
    assert found.words == [word.text.lower() for word in words]
    assert found.spans == [(word.start, word.end) for word in words]


def test_words_of_the_sample():
    texts = [dialogue.text for dialogue in load_dialogues("train", "sample")]
    tokenizer = train_word_tokenizer(texts, SPECIAL, min_count=1)
    for text, found in zip(texts, encode_words(tokenizer, texts), strict=True):
        assert found.words == [word.text.lower() for word in split_words(text)]
        assert tokenizer.decode(found.ids) == " ".join(found.words)
        assert tokenizer.unk_token_id not in found.ids


VOCABULARY = {"the": 4, "dog": 5, "cat": 6}


class TestVectors:
    def test_text_and_array(self, tmp_path):
        lines = ["the 1 2 3", "mouse 4 5 6", "cat -1 0.5 2e-1", "the 9 9 9"]
        (tmp_path / "glove.txt").write_text("\n".join(lines) + "\n")
        (tmp_path / "word2vec.txt").write_text("\n".join(["4 3", *lines]))
        np.save(tmp_path / "array.npy", np.array([line.split()[1:] for line in lines], np.float64))
        (tmp_path / "array.txt").write_text("\n".join(line.split()[0] for line in lines))
        for name in ("glove.txt", "word2vec.txt", "array.npy"):
            ids, vectors = load_vectors(tmp_path / name, VOCABULARY, 3)
            assert ids.tolist() == [4, 6]
            np.testing.assert_array_equal(vectors, np.array([[1, 2, 3], [-1, 0.5, 0.2]], np.float32))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("the 1 2\n", "vector of 'the' in .* has 2 numbers; expected 3"),
            ("the 1 2 nan\n", "numbers that are not finite"),
            ("the 1 2 x\n", "cannot be read"),
            ("the\n", "line 1 has no numbers"),
            ("mouse 1 2 3\n", "has no vector of any word"),
        ],
    )
    def test_files_that_are_no_vectors(self, tmp_path, text, message):
        (tmp_path / "file.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            load_vectors(tmp_path / "file.txt", VOCABULARY, 3)

    def test_missing_words_of_an_array(self, tmp_path):
        np.save(tmp_path / "array.npy", np.zeros((2, 3)))
        with pytest.raises(UserError, match=r"cannot be read: .*array\.txt"):
            load_vectors(tmp_path / "array.npy", VOCABULARY, 3)
        (tmp_path / "array.txt").write_text("the")
        with pytest.raises(UserError, match=r"shape is \(2, 3\), but array\.txt has 1 words"):
            load_vectors(tmp_path / "array.npy", VOCABULARY, 3)
