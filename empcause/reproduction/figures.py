"""The figures of a row with their intervals, and the differences between two rows, from what evaluations saved per item."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from empcause.data import split_words
from empcause.evaluation.significance import (
    Interval,
    bootstrap,
    jackknife_interval,
    normal_p,
    sign_flip_p,
)

Array = NDArray[np.float64]


class Difference(NamedTuple):
    """A paired difference: its interval, and the p-value of there being none."""

    interval: Interval
    p: float


@dataclass(frozen=True)
class Ratio:
    """A sum over items divided by another one: a mean, a perplexity, bits per byte.

    Attributes:
        numerators, denominators: `[n]` values per item.
        scale: what is computed of the ratio.
        unit: what the denominators count, where rows differ in that: a digest of the tokens.
    """

    numerators: Array
    denominators: Array
    scale: Callable[[Any], Any] = lambda ratio: ratio
    unit: str = ""

    @property
    def value(self) -> float:
        """The figure."""
        return float(self.scale(self.numerators.sum() / self.denominators.sum()))

    def interval(self) -> Interval:
        """The figure with its bootstrap interval over items."""
        return bootstrap(lambda a, b: self.scale(a / b), self.numerators, self.denominators)

    def fits(self, other: "Figure") -> bool:
        """Whether another row's figure is of the same items in the same units, so that a difference means something."""
        same = isinstance(other, Ratio) and self.unit == other.unit
        return same and np.array_equal(self.denominators, other.denominators)  # type: ignore[union-attr]

    def minus(self, other: "Ratio") -> Difference:
        """The paired difference to another row's figure, which must fit this one."""
        interval = bootstrap(
            lambda a, b, n: self.scale(a / n) - self.scale(b / n), self.numerators, other.numerators, self.denominators
        )
        return Difference(interval, sign_flip_p(self.numerators - other.numerators))


@dataclass(frozen=True)
class Variety:
    """Distinct-n of replies.

    Attributes:
        value: of all replies.
        without: `[n]` of all replies but one, for each of them.
    """

    value: float
    without: Array

    def interval(self) -> Interval:
        """The figure with its jackknife interval over replies."""
        value, low, high = jackknife_interval(self.value, self.without)
        return Interval(value, None if low is None else max(0.0, low), None if high is None else min(1.0, high))

    def fits(self, other: "Figure") -> bool:
        """Whether another row's figure is of as many replies, on whose number Distinct depends."""
        return isinstance(other, Variety) and len(self.without) == len(other.without)

    def minus(self, other: "Variety") -> Difference:
        """The paired difference to another row's figure, which must fit this one."""
        interval = jackknife_interval(self.value - other.value, self.without - other.without)
        return Difference(interval, normal_p(interval))


Figure = Ratio | Variety


def mean_of(values: Array) -> Ratio:
    """The mean of `[n]` values."""
    return Ratio(values, np.ones(len(values)))


def variety(responses: Sequence[str], n: int) -> Variety:
    """Distinct-n of replies, and what it would be without each of them."""
    words = [[word.text.lower() for word in split_words(response)] for response in responses]
    grams = [list(zip(*(each[start:] for start in range(n)), strict=False)) for each in words]
    replies_with = Counter(gram for each in grams for gram in set(each))
    number, different = sum(map(len, grams)), len(replies_with)
    own = np.array([sum(replies_with[gram] == 1 for gram in set(each)) for each in grams], np.float64)
    others = number - np.array([len(each) for each in grams], np.float64)
    without = np.divide(different - own, others, out=np.zeros(len(grams)), where=others > 0)
    return Variety(different / number if number else 0.0, without)


def read_figures(task: str, folders: Sequence[Path]) -> dict[str, Figure]:
    """Read the figures that the evaluations of a row saved.

    Of several evaluations, each item counts with the mean of its values over them (its mean NLL, for a perplexity), and Distinct
    is the mean of their values.

    Args:
        task: "extractor" or "generator", what was evaluated.
        folders: output folders of the evaluations of one row on the same items, one per seed and view.

    Returns:
        Figures by column; what the system cannot do is missing.
    """
    saved = [json.loads((folder / "items.json").read_text(encoding="utf-8")) for folder in folders]
    names = {name for name, values in saved[0].items() if isinstance(values, list) and values} - {"ids"}
    means = {name: np.mean([each[name] for each in saved], axis=0) for name in names}
    if task == "extractor":
        return {name: mean_of(values) for name, values in means.items()}
    figures: dict[str, Figure] = {
        name: mean_of(values) for name, values in means.items() if name not in ("nll", "tokens", "bytes", "unknown")
    }
    if "nll" in means:
        figures["perplexity"] = Ratio(means["nll"], means["tokens"], np.exp, saved[0]["scored"])
    if "bytes" in means:
        figures["bits_per_byte"] = Ratio(means["nll"] / np.log(2), means["bytes"])
    replies = [
        [item["response"] for item in json.loads((folder / "responses.json").read_text(encoding="utf-8"))]
        for folder in folders
    ]
    if replies[0]:
        for n in (1, 2):
            each = [variety(responses, n) for responses in replies]
            figures[f"distinct_{n}"] = Variety(
                float(np.mean([one.value for one in each])), np.mean([one.without for one in each], axis=0)
            )
    return figures


def read_vocabulary(folder: Path) -> dict[str, Any] | None:
    """Read which vocabulary of words a system scored responses with.

    Args:
        folder: output folder of an evaluation.

    Returns:
        `size` in tokens, and `unknown_share`, the share of unknown words among the scored tokens; None for a system without one.
    """
    saved = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    if saved.get("vocab_size") is None:
        return None
    return {"size": saved["vocab_size"], "unknown_share": sum(saved["unknown"]) / sum(saved["tokens"])}
