"""Distributions of token counts: fixed, uniform, lognormal, or drawn from another trace."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Protocol

import numpy as np

from traces.options import unknown
from traces.schema import MAX_TOKENS, Ints, TraceError

_Z90 = NormalDist().inv_cdf(0.9)


class Lengths(Protocol):
    """A distribution of whole numbers of tokens, at least 1."""

    def sample(self, rng: np.random.Generator, n: int) -> Ints:
        """n independent draws."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Fixed:
    """Always the same length."""

    tokens: int

    def __post_init__(self) -> None:
        _require_positive(tokens=self.tokens)

    def sample(self, rng: np.random.Generator, n: int) -> Ints:
        """n times the same."""
        return np.full(n, self.tokens, np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Uniform:
    """Every length from `low_tokens` to `high_tokens`, both included, equally often."""

    low_tokens: int
    high_tokens: int

    def __post_init__(self) -> None:
        _require_positive(low_tokens=self.low_tokens, high_tokens=self.high_tokens)
        if self.high_tokens < self.low_tokens:
            raise TraceError(f"high_tokens={self.high_tokens} is below low_tokens={self.low_tokens}; swap them")

    def sample(self, rng: np.random.Generator, n: int) -> Ints:
        """n independent draws."""
        return rng.integers(self.low_tokens, self.high_tokens, n, endpoint=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogNormal:
    """Lognormal with this median and 90th percentile, rounded to whole tokens, at least 1."""

    median_tokens: int
    p90_tokens: int

    def __post_init__(self) -> None:
        _require_positive(median_tokens=self.median_tokens, p90_tokens=self.p90_tokens)
        if self.p90_tokens < self.median_tokens:
            raise TraceError(f"p90_tokens={self.p90_tokens} is below median_tokens={self.median_tokens}; swap them")

    def sample(self, rng: np.random.Generator, n: int) -> Ints:
        """n independent draws."""
        sigma = math.log(self.p90_tokens / self.median_tokens) / _Z90
        draws = np.rint(rng.lognormal(math.log(self.median_tokens), sigma, n))
        return np.maximum(draws, 1).astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Empirical:
    """Draws with replacement from observed lengths."""

    observed_tokens: Ints = field(repr=False)

    def __post_init__(self) -> None:
        if not len(self.observed_tokens) or self.observed_tokens.min() < 1:
            raise TraceError(f"observed_tokens={self.observed_tokens}: must be lengths of at least 1 token")

    def sample(self, rng: np.random.Generator, n: int) -> Ints:
        """n independent draws."""
        return rng.choice(self.observed_tokens, n)


_FORMS = {
    "fixed": "fixed:TOKENS",
    "uniform": "uniform:LOW:HIGH",
    "lognormal": "lognormal:MEDIAN:P90",
    "empirical": "empirical:TRACE",
}


def parse_lengths(text: str, column: str) -> Lengths:
    """`fixed:200`, `uniform:10:20`, `lognormal:1000:4000` (median, p90) or `empirical:TRACE`, that trace's `column`."""
    kind, _, rest = text.partition(":")
    if kind not in _FORMS:
        raise unknown("length distribution", kind, _FORMS)
    if kind == "empirical":
        from traces.catalogue import load  # not needed to describe other lengths

        return Empirical(observed_tokens=getattr(load(rest), column))
    try:
        numbers = [int(number) for number in rest.split(":")]
        if kind == "fixed":
            (tokens,) = numbers
            return Fixed(tokens=tokens)
        first, second = numbers
    except TraceError:
        raise
    except ValueError as error:
        raise TraceError(f"length distribution {text!r}: must be {_FORMS[kind]} in whole tokens") from error
    if kind == "uniform":
        return Uniform(low_tokens=first, high_tokens=second)
    return LogNormal(median_tokens=first, p90_tokens=second)


def _require_positive(**tokens: int) -> None:
    for name, value in tokens.items():
        if not 1 <= value <= MAX_TOKENS:
            raise TraceError(f"{name}={value}: must be at least 1 token, and at most {MAX_TOKENS:,}")
