"""Numbers on the command line."""

from argparse import ArgumentTypeError
from collections.abc import Callable

from empcause.ranges import Range


def number(kind: type[int] | type[float], allowed: Range) -> Callable[[str], int | float]:
    """An argparse type: numbers within a range."""

    def read(word: str) -> int | float:
        value = kind(word)
        if value not in allowed:
            raise ArgumentTypeError(f"{word} is not {'a whole number' if kind is int else 'a number'} {allowed}")
        return value

    read.__name__ = kind.__name__  # argparse names it where a word is no number at all
    return read
