"""Arrival times: renewal processes with gamma or Weibull gaps (ServeGen's families), and spreading coarse clocks."""

import math
from dataclasses import replace

import numpy as np

from traces.schema import MAX_REQUESTS, Floats, Trace, TraceError

FAMILIES = ("gamma", "weibull")
SHAPES = (1e-4, 1e6)
"""Least and most: of gamma gaps, CVs of 100 and 0.001. Below, all of any span's requests arrive in one instant."""


def shape_for_cv(family: str, cv: float) -> float:
    """The family's shape parameter whose gaps have this coefficient of variation (standard deviation / mean)."""
    if family == "gamma":
        least, most = (1 / math.sqrt(shape) for shape in reversed(SHAPES))
        if not least <= cv <= most:
            raise TraceError(f"cv={cv:g}: must be from {least:g} to {most:g} for gamma gaps")
        return 1 / cv**2
    # The Weibull CV falls with the shape; bisect its logarithm.
    low, high = 0.05, 100.0
    if not _weibull_cv(high) <= cv <= _weibull_cv(low):
        raise TraceError(f"cv={cv}: a Weibull gap has a CV from {_weibull_cv(high):.3g} to {_weibull_cv(low):.3g}")
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _weibull_cv(middle) > cv else (low, middle)
    return math.sqrt(low * high)


def renewal_s(rng: "np.random.Generator", *, rate_rps: float, family: str, shape: float, span_s: float) -> Floats:
    """Arrival times in [0, span_s), sorted, `rate_rps * span_s` of them on average whatever the family and shape.

    The first gap is drawn from the equilibrium distribution (a uniform part of a length-biased gap: Cox, Renewal
    Theory, 1962, section 5.2). Starting at an arrival instead would add about (CV^2 - 1) / 2 requests to every span.
    """
    if not SHAPES[0] <= shape <= SHAPES[1]:
        raise TraceError(f"shape={shape:g}: must be from {SHAPES[0]:g} to {SHAPES[1]:g}")
    if not rate_rps * span_s <= MAX_REQUESTS:
        raise TraceError(
            f"rate={rate_rps:g}/s over {span_s:g} s: at most {MAX_REQUESTS:,} requests are drawn; lower one of them"
        )
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
        if sum(map(len, pieces)) > 2 * MAX_REQUESTS:
            raise TraceError(
                f"shape={shape:g}: gaps so uneven give more than {MAX_REQUESTS:,} requests; raise the shape"
            )
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
