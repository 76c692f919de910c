"""Confidence intervals against printed tables, theory of known processes, and how often they cover the truth."""

import math

import numpy as np
import pytest

from kvsim.results.intervals import block_length, bootstrap, t_interval, t_quantile


@pytest.mark.parametrize(
    ("degrees", "printed"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980), (100_000, 1.960)],
)
def test_students_t_as_printed(degrees, printed):
    assert t_quantile(0.975, degrees) == pytest.approx(printed, abs=5e-4)


def test_an_interval_by_hand():
    """Mean 12, standard deviation 2 of three values, so 12 +- 4.303 * 2 / sqrt(3)."""
    mean, low, high = t_interval([10.0, 12.0, 14.0])
    assert mean == 12
    assert (12 - low, high - 12) == pytest.approx((4.30265 * 2 / math.sqrt(3),) * 2, rel=1e-5)


def autoregressive(rho, n, seed):
    """A stationary AR(1) process of variance 1 / (1 - rho^2)."""
    noise = np.random.default_rng(seed).normal(size=n + 200)
    values = np.empty_like(noise)
    values[0] = noise[0]
    for i in range(1, len(noise)):
        values[i] = rho * values[i - 1] + noise[i]
    return values[200:]


def test_intervals_cover_the_mean_wait_of_an_md1_queue():
    """Pollaczek-Khinchine's mean wait lies in a 95 % interval over 8 runs in about 190 of 200 experiments.

    By the binomial distribution in 184 to 196 of them, with probability 0.95; each run is a tail of Lindley's
    recursion long enough to have forgotten its empty start.
    """
    rho, rng, covered = 0.5, np.random.default_rng(3), 0
    gaps = rng.exponential(1 / rho, (200 * 8, 600))
    waits, total = np.zeros(len(gaps)), np.zeros(len(gaps))
    for i in range(gaps.shape[1]):
        waits = np.maximum(0.0, waits + 1 - gaps[:, i])
        total += waits if i >= 100 else 0.0
    for means in (total / 500).reshape(200, 8):
        _, low, high = t_interval(means.tolist())
        covered += low <= rho / (2 * (1 - rho)) <= high
    assert 184 <= covered <= 196


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_blocks_are_as_long_as_theory_says_for_an_autoregressive_process(rho):
    """The optimal circular length (6 rho^2 / (1 - rho^2)^2)^(1/3) n^(1/3), from its autocovariance rho^|k|.

    G = sum |k| rho^|k| = 2 rho / (1 - rho)^2 and g(0) = (1 + rho) / (1 - rho), so 2 G^2 / (4/3 g(0)^2) is that.
    """
    n = 40_000
    lengths = [block_length(autoregressive(rho, n, seed)) for seed in range(5)]
    optimal = max(1.0, (6 * rho**2 / (1 - rho**2) ** 2) ** (1 / 3) * n ** (1 / 3))
    assert np.median(lengths) == pytest.approx(optimal, rel=0.25, abs=3)


@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_the_bootstrap_of_a_mean_is_as_wide_as_dependence_makes_it(rho):
    """The mean of an AR(1) process has standard error 1 / ((1 - rho) sqrt(n)), wherever independence would say less."""
    n = 4000
    values = autoregressive(rho, n, 5)
    [(low, high)] = bootstrap(n, block_length(values), 400, 1, lambda times: [times @ values / n])
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / ((1 - rho) * math.sqrt(n)), rel=0.15)


def test_a_bootstrap_sample_is_blocks_of_the_whole_length():
    seen = []
    bootstrap(10, 4, 50, 2, lambda times: [seen.append(times) or 0.0])
    for times in seen:
        assert times.sum() == 10  # two blocks of four and one of two, on a circle
        assert times.max() <= 3
    assert any(times[9] and times[0] and not times[5] for times in seen)  # a block that goes round


def test_constant_series_have_no_spread():
    assert block_length(np.full(100, 3.0)) == 1
    assert bootstrap(100, 1, 20, 0, lambda times: [float(times @ np.full(100, 3.0)) / 100]) == [(3.0, 3.0)]
