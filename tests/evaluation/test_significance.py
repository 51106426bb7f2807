"""Intervals against a well-known implementation, and what they are for."""

import math

import numpy as np
import pytest

from empcause.evaluation.significance import (
    bootstrap,
    difference_interval,
    holm,
    jackknife_interval,
    mean_interval,
    normal_p,
    perplexity_difference,
    perplexity_interval,
    sign_flip_p,
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


class TestTests:
    def test_sign_flips_of_a_few_items_are_counted(self):
        """Four differences of one sign: only all plus and all minus are as far from 0, 2 of 16."""
        assert sign_flip_p([2 / 3, 1 / 3, 1 / 3, 0, 2 / 3]) == 0.125
        assert sign_flip_p([0.0, 0.0]) == 1
        assert sign_flip_p([1.0, -1.0]) == 1

    def test_sign_flips_match_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        values = np.random.default_rng(0).normal(0.1, 1, 200)
        theirs = stats.permutation_test(
            (values, np.zeros(200)),
            lambda a, b: np.mean(a - b),
            permutation_type="samples",
            rng=np.random.default_rng(1),
        )
        assert sign_flip_p(values) == pytest.approx(theirs.pvalue, abs=0.02)

    def test_sign_flips_are_right_where_nothing_differs(self):
        """Without a difference, a p-value is at most .1 in a tenth of the experiments."""
        random = np.random.default_rng(0)
        found = np.array([sign_flip_p(random.normal(0, 1, 30), draws=400) for _ in range(400)])
        assert (found <= 0.1).mean() == pytest.approx(0.1, abs=0.04)

    def test_holm(self):
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert holm([0.6, 0.7]) == [1, 1]
        assert holm([]) == []

    def test_jackknife_of_a_mean_is_its_standard_error(self):
        values = np.random.default_rng(0).normal(2, 3, 50)
        without = (values.sum() - values) / 49
        interval = jackknife_interval(values.mean(), without)
        error = values.std(ddof=1) / math.sqrt(50)
        assert interval.high - interval.value == pytest.approx(1.96 * error, rel=1e-4)
        assert normal_p(interval) == pytest.approx(math.erfc(values.mean() / error / math.sqrt(2)), rel=1e-3)
        assert jackknife_interval(1.0, [0.5]) == (1.0, None, None)

    def test_figures_that_are_not_finite(self):
        with pytest.raises(ValueError, match="a difference is not a finite number"):
            sign_flip_p([1.0, math.nan])
        with pytest.raises(ValueError, match="a figure is not a finite number"):
            jackknife_interval(1.0, [math.inf])
