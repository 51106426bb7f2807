"""Numbers on the command line."""

from argparse import ArgumentTypeError
from collections.abc import Callable

from empcause.ranges import Range


def number(kind: type[int] | type[float], allowed: Range) -> Callable[[str], int | float]:
    """Make an argparse type that accepts the numbers of a range."""

    def read(word: str) -> int | float:
        value = kind(word)
        if value not in allowed:
            raise ArgumentTypeError(f"{word} is not {'a whole number' if kind is int else 'a number'} {allowed}")
        return value

    read.__name__ = kind.__name__  # argparse shows this name if a word is no number at all
    return read
