"""Which words of a text are emotion words: those of a lexicon, and adjectives where a tagger is given."""

import os
from collections.abc import Callable, Collection, Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from empcause.data import is_content_word
from empcause.errors import UserError
from empcause.text import one_line

VADER = "vader"


def load_lexicon(source: str | os.PathLike[str] = VADER) -> frozenset[str]:
    """Load a lexicon of emotion words.

    Args:
        source: "vader", the alphabetic words of the lexicon in the package vaderSentiment; or a file with one word a line, or
            with the word before the first tab as NRC's.

    Returns:
        Its words, lower-cased.

    Raises:
        UserError: the package is not installed, or the file cannot be read or holds something else than words.
    """
    if source == VADER:
        try:
            text = resources.files("vaderSentiment").joinpath("vader_lexicon.txt").read_text(encoding="utf-8")
        except (ImportError, OSError) as error:
            raise UserError(
                "The lexicon vader needs the package vaderSentiment: pip install 'empcause[baselines]', or give a file as "
                "emotion_lexicon."
            ) from error
        return frozenset(word.lower() for word in _first_column(text) if word.isalpha())
    file = Path(source)
    try:
        words = _first_column(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"The lexicon {file} cannot be read: {one_line(error)}") from error
    for word in words:
        if len(word.split()) > 1 or not word.isprintable():
            raise UserError(f"{file} is no lexicon: {word[:60]!r} is not one word; expected one word a line.")
    if not any(map(is_content_word, words)):
        raise UserError(f"{file} is no lexicon: it holds no words; expected one word a line.")
    return frozenset(word.lower() for word in words)


def _first_column(text: str) -> list[str]:
    columns = (line.split("\t")[0].strip() for line in text.splitlines())
    return [word for word in columns if word]


def load_tagger(path: str | os.PathLike[str]) -> Callable[[Sequence[str]], list[bool]]:
    """Load a spaCy model that tells which words are adjectives.

    Args:
        path: the model's folder, the one with its `config.cfg`.

    Returns:
        A function that says for each word of a text whether it is tagged as an adjective.

    Raises:
        UserError: spaCy is not installed, there is no such model, or it has no tagger of English.
    """
    try:
        spacy: Any = import_module("spacy")
        tokens: Any = import_module("spacy.tokens")
    except ImportError as error:
        raise UserError(
            "adjectives need the package spacy: pip install 'empcause[baselines]', or leave adjectives out."
        ) from error
    try:
        pipeline = spacy.load(Path(path), exclude=["parser", "ner", "lemmatizer"])
    except (OSError, ValueError) as error:
        raise UserError(f"There is no spaCy model at {path}: {one_line(error)}") from error

    def is_adjective(words: Sequence[str]) -> list[bool]:
        document = pipeline(tokens.Doc(pipeline.vocab, words=list(words)))
        return [token.tag_.startswith("JJ") for token in document]

    if is_adjective(["a", "happy", "man"]) != [False, True, False]:
        raise UserError(f"The spaCy model at {path} does not tag English adjectives; give one that does.")
    return is_adjective


def emotion_words(
    words: Sequence[str], lexicon: Collection[str], tagger: Callable[[Sequence[str]], list[bool]] | None = None
) -> list[int]:
    """Find the emotion words of a text: content words that are in the lexicon or adjectives.

    Args:
        words: the words of the text, lower-cased.
        lexicon: words of emotion.
        tagger: what `load_tagger` gives; None: adjectives do not count.

    Returns:
        The indices of the emotion words, in order; a word that is repeated counts each time.
    """
    adjectives = tagger(words) if tagger is not None and words else [False] * len(words)
    return [
        index
        for index, (word, adjective) in enumerate(zip(words, adjectives, strict=True))
        if (adjective or word in lexicon) and is_content_word(word)
    ]
