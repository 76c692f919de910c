"""Confidence intervals: Student's t over independent runs, a block bootstrap over the requests of a single one."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Interval(NamedTuple):
    """An estimate, and the interval that covers what is estimated in 95 % of all cases."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values, at least two, and Student's t interval around it."""
    n, mean = len(values), math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    margin = t_quantile(0.5 + CONFIDENCE / 2, n - 1) * error
    return Interval(mean, mean - margin, mean + margin)


def t_quantile(share: float, degrees: int) -> float:
    """The value that Student's t with so many degrees of freedom exceeds with probability 1 - `share`, above a half."""
    low, high = 0.0, 1.0
    while _t_inside(high, degrees) < 2 * share - 1:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _t_inside(middle, degrees) < 2 * share - 1 else (low, middle)
    return high


def _t_inside(t: float, degrees: int) -> float:
    """Probability of a value between -t and t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def block_length(series: Floats) -> int:
    """How many successive values to resample together so that their dependence survives: at least 1.

    For the circular block bootstrap, by Politis and White (2004) as corrected by Patton, Politis and White (2009).
    """
    n = len(series)
    longest = min(math.ceil(3 * math.sqrt(n)), n // 3)
    if longest < 2 or not np.ptp(series):
        return 1
    needed = max(5, math.ceil(math.sqrt(math.log10(n))))
    covariance = _autocovariance(series, min(n - 1, math.ceil(math.sqrt(n)) + needed))
    small = np.abs(covariance / covariance[0]) < 2 * math.sqrt(math.log10(n) / n)
    # The last lag before so many insignificant ones; where there is none, the last significant lag.
    runs = [lag for lag in range(len(small) - needed) if small[lag + 1 : lag + 1 + needed].all()]
    last = runs[0] if runs else int(np.flatnonzero(~small)[-1])
    width = min(2 * max(last, 1), len(covariance) - 1)
    lags = np.arange(1, width + 1)
    weights = np.minimum(1.0, 2 * (1 - lags / width)) * covariance[1 : width + 1]
    spectrum, slope = covariance[0] + 2 * weights.sum(), 2 * (weights * lags).sum()
    if spectrum <= 0:
        return longest
    best = (2 * slope**2 / (4 / 3 * spectrum**2)) ** (1 / 3) * n ** (1 / 3)
    return int(min(max(1, math.ceil(best)), longest))


def _autocovariance(series: Floats, lags: int) -> Floats:
    """Sample autocovariances at lags 0 to `lags`, by a Fourier transform."""
    n = len(series)
    size = 1 << (n + lags).bit_length()
    transform = np.fft.rfft(series - series.mean(), size)
    return np.asarray(np.fft.irfft(np.abs(transform) ** 2, size)[: lags + 1] / n)


def bootstrap(
    n: int, length: int, samples: int, seed: int, figures: Callable[[Ints], Sequence[float]]
) -> list[tuple[float, float]]:
    """Percentile intervals of `figures` of a series of n, which is given how often each position was drawn.

    Circular blocks of `length` positions are drawn with replacement (Politis and Romano 1992). NaN where a figure was
    ever NaN.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        starts = rng.integers(0, n, -(-n // length))
        lengths = np.full(len(starts), length)
        lengths[-1] = n - length * (len(starts) - 1)
        # Blocks as differences of their ends, on two rounds of the circle; then the second is folded onto the first.
        change = np.bincount(starts, minlength=2 * n + 1) - np.bincount(starts + lengths, minlength=2 * n + 1)
        times = np.cumsum(change[: 2 * n])
        drawn.append(figures(times[:n] + times[n:]))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.array(drawn), [tail, 100 - tail], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))
