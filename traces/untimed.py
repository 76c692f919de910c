"""Arrivals for traces that record none: drawn at a stated rate."""

from __future__ import annotations

import math

import numpy as np

from traces.schema import Floats, TraceError


def checked_rate(rate_rps: float) -> float:
    """The rate in requests/s, or 0: not stated. Raises TraceError."""
    if not (math.isfinite(rate_rps) and rate_rps >= 0):
        raise TraceError(f"rate_rps={rate_rps}: must be finite and above 0")
    return rate_rps


def poisson_s(n: int, rate_rps: float, seed: int, why: str, what: str = "requests") -> tuple[Floats, str]:
    """n arrivals with exponential gaps, the first at 0, and a note; raises TraceError where no rate is stated."""
    if not rate_rps:
        raise TraceError(f"{why}, so no arrivals are recorded; say how many {what} arrive in a second: rate_rps=1")
    gaps_s = np.random.default_rng(seed).exponential(1 / rate_rps, n)
    gaps_s[:1] = 0.0
    return np.cumsum(gaps_s), f"arrivals are not recorded: {what} drawn at {rate_rps:g}/s, Poisson (seed {seed})"
