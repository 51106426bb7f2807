"""Intervals against a well-known implementation, and what they are for."""

import math

import numpy as np
import pytest

from empcause.evaluation.significance import (
    bootstrap,
    difference_interval,
    mean_interval,
    perplexity_difference,
    perplexity_interval,
)


class TestSignificance:
    def test_interval_of_a_mean_matches_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        values = np.random.default_rng(0).normal(0.4, 0.2, 300)
        ours = mean_interval(values)
        theirs = stats.bootstrap(
            (values,), np.mean, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        assert ours.value == pytest.approx(values.mean())
        assert ours.low == pytest.approx(theirs.low, abs=2e-3)
        assert ours.high == pytest.approx(theirs.high, abs=2e-3)

    def test_paired_difference_is_narrower_than_unpaired(self):
        random = np.random.default_rng(0)
        difficulty = random.normal(0, 1, 400)
        first, second = difficulty + 0.05 + random.normal(0, 0.05, 400), difficulty + random.normal(0, 0.05, 400)
        paired = difference_interval(first, second)
        assert paired.low > 0
        assert paired.high - paired.low < 0.1 * (mean_interval(first).high - mean_interval(first).low)

    def test_perplexities(self):
        nll, tokens = np.array([3.0, 8.0, 5.0]), np.array([2, 5, 3])
        interval = perplexity_interval(nll, tokens)
        assert interval.value == pytest.approx(math.exp(16 / 10))
        assert interval.low <= interval.value <= interval.high
        same = perplexity_difference(nll, nll, tokens)
        assert tuple(same) == (0, 0, 0)

    def test_same_seed_same_interval_and_no_items(self):
        assert mean_interval([1.0, 2.0, 4.0]) == mean_interval([1.0, 2.0, 4.0])
        with pytest.raises(ValueError, match="at least one item"):
            bootstrap(lambda sums: sums, [])
