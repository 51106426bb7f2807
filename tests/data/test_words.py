"""Words, and values carried between tokenizers through characters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from empcause.data import align_max, is_content_word, locate_words, split_words
from empcause.errors import UserError

TEXTS = [
    "I don't know -- my dog's ill, and I can't sleep!",
    "So  many   spaces\tand a\nnew line",
    "I'm sooo happy 😀👩‍👩‍👧 today… really 👍🏽!",
    "мой брат уехал в Норвегию вчера",
    "我妹妹搬到挪威去了。",
    "मेरी बहन नॉर्वे चली गई",
    "naïve café résumé, we’ve won’t",
    "",
]


def texts_of(text):
    return [word.text for word in split_words(text)]


def test_contractions_and_punctuation():
    assert texts_of("I'm sure they don't, isn't it?") == [
        "I", "'m", "sure", "they", "do", "n't", ",", "is", "n't", "it", "?",
    ]  # fmt: skip
    assert texts_of("we’ve") == ["we", "’ve"]
    assert texts_of("Wow!!") == ["Wow", "!", "!"]


def test_other_scripts_and_emoji_stay_whole():
    assert texts_of("मेरी बहन") == ["मेरी", "बहन"]
    assert texts_of("ok 👩‍👩‍👧!") == ["ok", "👩‍👩‍👧", "!"]
    assert texts_of("❤️ 1️⃣ 🏳️‍🌈") == ["❤️", "1️⃣", "🏳️‍🌈"]


def test_what_is_not_seen_cuts_no_word():
    for word in ("می\u200cخواهم", "क्\u200dष", "lone\u00adly", "cafe\u0301s"):
        assert texts_of(f"({word} x") == ["(", word, "x"]


@pytest.mark.parametrize("text", TEXTS)
def test_spans_are_the_words_places(text):
    words = split_words(text)
    assert all(text[word.start : word.end] == word.text for word in words)
    covered = "".join(word.text for word in words)
    assert covered == "".join(text.split()), "everything but whitespace belongs to a word"


@pytest.mark.parametrize(
    ("word", "content"), [("the", False), ("I", False), ("n't", False), ("'s", False), ("!", False), ("…", False),
                          ("dog", True), ("Norway", True), ("2019", True), ("挪威", True), ("😀", False)]
)  # fmt: skip
def test_content_words(word, content):
    assert is_content_word(word) is content


def test_locating_an_existing_split():
    words = locate_words("the cat saw the dog", ["the", "cat", " ", "saw", "the", "dog"])
    assert [(word.start, word.end) for word in words] == [(0, 3), (4, 7), (7, 7), (8, 11), (12, 15), (16, 19)]
    with pytest.raises(UserError, match="'bird' does not occur"):
        locate_words("the cat", ["the", "bird"])


def test_align_takes_the_largest_overlapping_value():
    source = [(0, 4), (4, 8), (10, 12), (3, 3)]
    got = align_max(source, [0.2, 0.9, 0.5, 1.0], [(0, 4), (3, 5), (8, 10), (11, 20), (3, 3)])
    assert got.tolist() == pytest.approx([0.2, 0.9, 0.0, 0.5, 0.0])
    assert align_max([], [], [(0, 1)]).tolist() == [0.0]
    assert align_max([(0, 1)], [1.0], []).shape == (0,)
    with pytest.raises(ValueError, match="source_values"):
        align_max([(0, 1)], [1.0, 2.0], [(0, 1)])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_align_equals_the_definition(data):
    span = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    sources, targets = data.draw(st.lists(span, max_size=6)), data.draw(st.lists(span, max_size=6))
    values = [data.draw(st.floats(0, 1, width=32)) for _ in sources]
    expected = [
        max((v for (a, b), v in zip(sources, values, strict=True) if set(range(a, b)) & set(range(c, d))), default=0.0)
        for c, d in targets
    ]
    assert align_max(sources, values, targets).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("text", TEXTS)
def test_between_two_real_tokenizers(text, tiny_encoder_dir, tiny_gpt2_dir):
    """Marking one word on one tokenizer's pieces marks exactly the pieces that overlap it on the other's."""
    first, second = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_encoder_dir, tiny_gpt2_dir))
    source = first(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    target = second(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    for word in split_words(text):
        values = [float(max(a, word.start) < min(b, word.end)) for a, b in source]
        marked = align_max(source, values, target)
        inside = np.array([max(a, word.start) < min(b, word.end) for a, b in target], bool)
        assert (marked[inside] == 1).all(), word
