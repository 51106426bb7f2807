"""The words of a raw text: their character spans, and which of them can be causes."""

from collections.abc import Sequence
from typing import NamedTuple

import regex

from empcause.errors import UserError


class Word(NamedTuple):
    """A word or punctuation mark and its character span `text[start:end]` in the raw text."""

    text: str
    start: int
    end: int


# Letters with their combining marks, digits, and invisible characters within a word: soft hyphen, (non-)joiners. A
# contraction's ending is a word of its own ("do|n't", "I|'m"), as in EmoCause; anything else (punctuation, emoji) is one
# word per user-perceived character.
_LETTERS = r"[\p{L}\p{M}\p{N}_\u00ad\u200c\u200d\u2060]"
WORD_PATTERN = rf"n['’]t\b|['’](?:s|m|re|ve|d|ll)\b|{_LETTERS}+?(?=n['’]t\b)|{_LETTERS}+|(?!\s)\X"
_WORD = regex.compile(WORD_PATTERN, regex.IGNORECASE)
_LETTER = regex.compile(r"[\p{L}\p{N}]")

# Function words, which carry no content that could cause an emotion.
STOP_WORDS = frozenset(
    """
    a about above across after again against ago ai all almost along already also although always am among an and
    another any anybody anyone anything are around as at away be because been before behind being below beside besides
    between both but by ca can cannot could d despite did do does doing done down during each either else enough etc
    even ever every everybody everyone everything except few for from further get gets getting go goes going gonna got
    had has have having he hence her here hers herself him himself his how however i if im in indeed instead into is it
    its itself ive just ll lot m many may maybe me might mine more most much must my myself nearly neither never next no
    nobody none nor not nothing now n't of off often on once one ones only onto or other others our ours ourselves out
    over own per perhaps quite rather re really s same shall she should since so some somebody someone something
    sometimes soon still such t than that the their theirs them themselves then there therefore these they this those
    though through thus till to together too toward towards under unless until up upon us ve very was we well were what
    whatever when whenever where whereas wherever whether which while who whoever whole whom whose why will with within
    without wo would yet you your yours yourself yourselves
    'd 'll 'm 're 's 've feel feeling feelings feels felt
    """.split()
)


def split_words(text: str) -> list[Word]:
    """Split raw text into words and punctuation marks.

    Args:
        text: any text; emoji, repeated spaces, contractions and non-Latin letters included.

    Returns:
        The words in order, with `text[word.start:word.end] == word.text`; white space belongs to no word.
    """
    return [Word(match.group(), match.start(), match.end()) for match in _WORD.finditer(text)]


def is_content_word(word: str) -> bool:
    """Whether a word can be a cause: False for stop words and for punctuation."""
    lower = word.lower().replace("’", "'")
    return lower not in STOP_WORDS and _LETTER.search(lower) is not None


def locate_words(text: str, tokens: Sequence[str]) -> list[Word]:
    """Find the character spans of words that a data set has split already, by searching the raw text from left to right.

    Args:
        text: the raw text.
        tokens: its words in order. A blank one, of which EmoCause has some, gets an empty span at its place.

    Raises:
        UserError: a word does not occur behind the one before it.
    """
    words, place = [], 0
    for token in tokens:
        start = text.find(token, place) if token.strip() else place
        if start < 0:
            raise UserError(f"the word {token!r} does not occur in {text!r} after its character {place}.")
        end = start + len(token) if token.strip() else start
        words.append(Word(token, start, end))
        place = end
    return words
