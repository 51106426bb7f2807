"""Paired bootstrap: how sure a figure, or the difference between two systems on the same items, is."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A figure with its 95% confidence interval; a figure of a single item has no interval, so both ends are None."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f} (of one item: no interval)"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    statistic: Callable[..., NDArray[np.float64]],
    *items: ArrayLike,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over items. Several arrays are resampled together, so that a difference is paired.

    Args:
        statistic: computes `[r]` figures from the sums of `r` resamples: it gets one `[r]` array of sums per item array. (A mean
            is a sum / n; a perplexity is exp(sum of NLL / sum of tokens).)
        *items: arrays `[n]`, one value per test item.
        resamples: how often the items are drawn with replacement.
        confidence: coverage of the interval, in (0, 1).
        seed: seed of the resampling.

    Raises:
        ValueError: no items, arrays of different length, or a value that is not finite.
    """
    values = np.stack([np.asarray(array, np.float64) for array in items])
    number = values.shape[1]
    if number == 0:
        raise ValueError("a bootstrap needs at least one item.")
    if not np.isfinite(values).all():
        raise ValueError(
            f"item {int(np.argwhere(~np.isfinite(values))[0, 1])} has a figure that is not a finite number."
        )
    value = float(statistic(*values.sum(1, keepdims=True))[0])
    if number == 1:
        return Interval(value, None, None)
    random = np.random.default_rng(seed)
    sums = np.empty((len(values), resamples))
    for start in range(0, resamples, 250):  # not all at once: [resamples, n] would not fit in memory
        rows = min(250, resamples - start)
        draws = random.integers(number, size=(rows, number))
        sums[:, start : start + rows] = values[:, draws].sum(-1)
    low, high = np.quantile(statistic(*sums), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def mean_interval(items: ArrayLike, **options: float) -> Interval:
    """Mean of `[n]` items with its interval.

    Args:
        items: `[n]` values.
        **options: options of `bootstrap`, here and in the functions below.
    """
    number = len(np.asarray(items))
    return bootstrap(lambda sums: sums / number, items, **options)  # type: ignore[arg-type]


def difference_interval(first: ArrayLike, second: ArrayLike, **options: float) -> Interval:
    """Mean of `first - second`, item by item, with its interval."""
    number = len(np.asarray(first))
    return bootstrap(lambda a, b: (a - b) / number, first, second, **options)  # type: ignore[arg-type]


def perplexity_interval(nll: ArrayLike, tokens: ArrayLike, **options: float) -> Interval:
    """Corpus perplexity of `[n]` summed NLLs and token counts, with its interval."""
    return bootstrap(lambda a, b: np.exp(a / b), nll, tokens, **options)  # type: ignore[arg-type]


def perplexity_difference(first: ArrayLike, second: ArrayLike, tokens: ArrayLike, **options: float) -> Interval:
    """Difference of two corpus perplexities on the same items and tokens, with its paired interval."""
    return bootstrap(lambda a, b, n: np.exp(a / n) - np.exp(b / n), first, second, tokens, **options)  # type: ignore[arg-type]
