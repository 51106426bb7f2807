"""How sure a figure, or the difference between two systems on the same items, is: paired bootstrap, jackknife and tests."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
# Standard errors from the middle of a normal 95% interval to its ends.
_Z95 = 1.959964
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


def jackknife_interval(value: float, without: ArrayLike) -> Interval:
    """Interval of a figure that is no function of sums over items, such as Distinct, or of the difference of two such figures.

    The bootstrap cannot be used for Distinct: a resample holds the same reply several times, so that it is less varied than
    any sample. The standard error is the jackknife's, and the interval is the normal one.

    Args:
        value: the figure of all items.
        without: `[n]` the figure of all items but one, for each item.

    Raises:
        ValueError: a value is not finite.
    """
    values = np.asarray(without, np.float64)
    if not (math.isfinite(value) and np.isfinite(values).all()):
        raise ValueError("a figure is not a finite number.")
    number = len(values)
    if number < 2:
        return Interval(value, None, None)
    error = _Z95 * math.sqrt((number - 1) * float(values.var()))
    return Interval(value, value - error, value + error)


def normal_p(interval: Interval) -> float:
    """Two-sided p-value of a figure being 0, from its normal 95% interval; 1 where there is no interval."""
    if interval.low is None or interval.high is None:
        return 1.0
    error = (interval.high - interval.low) / (2 * _Z95)
    if error == 0:
        return 1.0 if interval.value == 0 else 0.0
    return math.erfc(abs(interval.value) / error / math.sqrt(2))


def sign_flip_p(differences: ArrayLike, *, draws: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p-value of the mean of paired differences being 0: the paired permutation test.

    If two systems are equally good, each item's difference has either sign with the same probability.

    Args:
        differences: `[n]` differences, item by item.
        draws: number of random choices of all signs; if there are no more choices than that, each is taken once, and the
            p-value is exact. Otherwise it is at least 1 / (draws + 1).
        seed: seed of the choices.

    Raises:
        ValueError: a difference is not finite.
    """
    every = np.asarray(differences, np.float64)
    if not np.isfinite(every).all():
        raise ValueError("a difference is not a finite number.")
    values = every[every != 0]
    number = len(values)
    if not number:
        return 1.0
    least = abs(values.sum()) * (1 - 1e-12)  # sums in another order differ by rounding
    if 2**number <= draws:
        signs = 1.0 - 2.0 * (np.arange(2**number)[:, None] >> np.arange(number) & 1)
        return float((abs(signs @ values) >= least).mean())
    random = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, draws, 250):
        signs = 1.0 - 2.0 * random.integers(2, size=(min(250, draws - start), number))
        extreme += int((abs(signs @ values) >= least).sum())
    return (1 + extreme) / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests by Holm's method (1979), in the order in which they are given.

    A test whose adjusted p-value is at most .05 stays significant if the probability of any false one shall be at most .05.
    """
    order = np.argsort(p_values, kind="stable").tolist()
    adjusted = [0.0] * len(order)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
