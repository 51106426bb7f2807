"""How probable the reference responses are, and how varied the generated ones."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from empcause.data import split_words


def perplexity(nll: ArrayLike, tokens: ArrayLike) -> float:
    """Perplexity of all responses together: exp(total negative log-likelihood / number of tokens).

    Args:
        nll: `[n]` summed negative log-likelihood per response, in nats.
        tokens: `[n]` number of tokens per response.

    Raises:
        ValueError: the numbers of responses differ, there is none, or a figure is not finite.
    """
    _check(nll, len(np.atleast_1d(tokens)))
    return float(np.exp(np.sum(nll) / np.sum(tokens)))


def nll_per_word(nll: ArrayLike, responses: Sequence[str]) -> float | None:
    """Negative log-likelihood in nats per word (`split_words`), which can be compared between tokenizers.

    Args:
        nll: `[n]` summed negative log-likelihood per response, in nats.
        responses: the responses.

    Returns:
        One figure for all responses; None if they have no word.

    Raises:
        ValueError: see `perplexity`.
    """
    _check(nll, len(responses))
    words = sum(len(split_words(text)) for text in responses)
    return float(np.sum(nll) / words) if words else None


def bits_per_byte(nll: ArrayLike, responses: Sequence[str]) -> float | None:
    """Negative log-likelihood in bits per UTF-8 byte, which can be compared between tokenizers.

    Args:
        nll: `[n]` summed negative log-likelihood per response, in nats.
        responses: the responses.

    Returns:
        One figure for all responses; None if they have no byte.

    Raises:
        ValueError: see `perplexity`.
    """
    _check(nll, len(responses))
    size = sum(len(text.encode()) for text in responses)
    return float(np.sum(nll) / np.log(2) / size) if size else None


def distinct_n(responses: Sequence[str], n: int, split: Callable[[str], Sequence[str]] | None = None) -> float:
    """Distinct-n (Li and others, 2016): number of different n-grams of words / number of all n-grams, over all responses.

    Args:
        responses: generated texts.
        n: length of the n-grams.
        split: splits a text into words; default is `split_words` in lower case.

    Returns:
        The share, in [0, 1]; 0 if there is no n-gram.
    """
    split = split or (lambda text: [word.text.lower() for word in split_words(text)])
    ngrams = [
        gram
        for response in responses
        for words in [split(response)]
        for gram in zip(*(words[start:] for start in range(n)), strict=False)
    ]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _check(nll: ArrayLike, responses: int) -> None:
    if np.shape(nll) != (responses,) or not responses or not np.isfinite(nll).all():
        raise ValueError(f"nll of shape {np.shape(nll)} is not a finite number for each of {responses} responses.")
