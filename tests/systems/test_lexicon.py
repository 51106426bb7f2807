"""Lexicons of emotion words, and which words of a text are in them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from empcause.errors import UserError
from empcause.systems.lexicon import emotion_words, load_lexicon, load_tagger


def test_one_word_a_line_or_before_a_tab(tmp_path):
    (tmp_path / "plain.txt").write_text("Happy\n\ncrash \n", encoding="utf-8-sig")
    (tmp_path / "nrc.txt").write_text("happy\tanger\t0\nhappy\tjoy\t1\ncrash\tfear\t0\n")
    for name in ("plain.txt", "nrc.txt"):
        assert load_lexicon(tmp_path / name) == {"happy", "crash"}


def test_vader():
    pytest.importorskip("vaderSentiment")
    words = load_lexicon()
    assert len(words) == 7209
    assert {"happy", "horrible"} <= words
    assert all(word.isalpha() for word in words)


def test_vader_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    with pytest.raises(UserError, match=r"needs the package vaderSentiment: pip install 'empcause\[baselines\]'"):
        load_lexicon()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it holds no words"),
        (b"the\n,\n", "it holds no words"),
        (b"happy\nThis is prose.\n", "'This is prose.' is not one word"),
        (b"\x00\x01\n", "is not one word"),
        (b"\xff\xfe\n", "cannot be read"),
    ],
)
def test_files_that_are_no_lexicon(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_lexicon(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be read"):
        load_lexicon(tmp_path / "nowhere")


def test_emotion_words_of_a_text():
    words = "i feel so sad about the old sad house".split()
    assert emotion_words(words, {"sad", "feel"}) == [3, 7], "stop words never count, repeated words do"
    assert emotion_words(words, {"sad"}, lambda words: [word in ("old", "so") for word in words]) == [3, 6, 7]
    assert emotion_words([], {"sad"}, lambda words: pytest.fail("there is nothing to tag")) == []


def make_spacy(monkeypatch, tags):
    """Install a module `spacy` whose models tag words by a dictionary."""

    def load(path, exclude):
        if path.name == "nowhere":
            raise OSError("Can't find model")
        pipeline = lambda document: [SimpleNamespace(tag_=tags.get(word, "NN")) for word in document]  # noqa: E731
        return type("Pipeline", (), {"__call__": staticmethod(pipeline), "vocab": None})()

    spacy, tokens = ModuleType("spacy"), ModuleType("spacy.tokens")
    spacy.load, tokens.Doc = load, lambda vocab, words: words
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    monkeypatch.setitem(sys.modules, "spacy.tokens", tokens)


def test_a_tagger(monkeypatch, tmp_path):
    make_spacy(monkeypatch, {"happy": "JJ", "older": "JJR"})
    assert load_tagger(tmp_path)(["an", "older", "dog"]) == [False, True, False]
    with pytest.raises(UserError, match="There is no spaCy model at"):
        load_tagger(tmp_path / "nowhere")
    make_spacy(monkeypatch, {})
    with pytest.raises(UserError, match="does not tag English adjectives"):
        load_tagger(tmp_path)
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match="adjectives need the package spacy"):
        load_tagger(tmp_path)
