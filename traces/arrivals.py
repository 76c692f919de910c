"""Arrival times: renewal processes with gamma or Weibull gaps (ServeGen's families), and spreading coarse clocks."""

import math
from dataclasses import replace

import numpy as np

from traces.schema import Floats, Trace, TraceError

FAMILIES = ("gamma", "weibull")


def shape_for_cv(family: str, cv: float) -> float:
    """The family's shape parameter whose gaps have this coefficient of variation (standard deviation / mean)."""
    if family == "gamma":
        return 1 / cv**2
    # The Weibull CV falls with the shape; bisect its logarithm.
    low, high = 0.05, 100.0
    if not _weibull_cv(high) <= cv <= _weibull_cv(low):
        raise TraceError(f"cv={cv}: a Weibull gap has a CV from {_weibull_cv(high):.3g} to {_weibull_cv(low):.3g}")
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _weibull_cv(middle) > cv else (low, middle)
    return math.sqrt(low * high)


def renewal_s(rng: np.random.Generator, *, rate_rps: float, family: str, shape: float, span_s: float) -> Floats:
    """Arrival times in [0, span_s), sorted, `rate_rps * span_s` of them on average whatever the family and shape.

    The first gap is drawn from the equilibrium distribution (a uniform part of a length-biased gap: Cox, Renewal
    Theory, 1962, section 5.2). Starting at an arrival instead would add about (CV^2 - 1) / 2 requests to every span.
    """
    if family == "gamma":
        mean, biased = shape, rng.gamma(shape + 1)
    elif family == "weibull":
        mean, biased = math.gamma(1 + 1 / shape), rng.gamma(1 + 1 / shape) ** (1 / shape)
    else:
        raise TraceError(f"arrival family={family!r}: known: {', '.join(FAMILIES)}")
    scale_s = 1 / (rate_rps * mean)
    pieces = [np.array([rng.random() * biased * scale_s])]
    batch = int(1.05 * rate_rps * span_s) + 16
    while pieces[-1][-1] < span_s:
        gaps = rng.gamma(shape, size=batch) if family == "gamma" else rng.weibull(shape, size=batch)
        pieces.append(pieces[-1][-1] + np.cumsum(gaps) * scale_s)
    times = np.concatenate(pieces)
    return times[: np.searchsorted(times, span_s)]


def spread(trace: Trace, spread_s: float, seed: int) -> Trace:
    """The trace with every arrival later by a uniform draw from [0, spread_s), for clocks with ticks of that length."""
    if not (math.isfinite(spread_s) and spread_s >= 0):
        raise TraceError(f"spread_s={spread_s}: must be finite and not negative; 0 keeps recorded arrivals")
    if not spread_s:
        return trace
    # Sorting the shifted times and leaving the rows in place keeps the recorded order of the requests.
    shifted = trace.arrival_s + np.random.default_rng(seed).uniform(0, spread_s, len(trace))
    note = f"arrivals spread by up to {spread_s:g} s (seed {seed})"
    return replace(trace, arrival_s=np.sort(shifted), notes=(*trace.notes, note))


def _weibull_cv(shape: float) -> float:
    return math.sqrt(math.exp(math.lgamma(1 + 2 / shape) - 2 * math.lgamma(1 + 1 / shape)) - 1)
