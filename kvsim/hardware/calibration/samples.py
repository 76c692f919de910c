"""Measured times of one kernel as columns, and which of its shapes a fit may see."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

_ROWS = {"m", "tokens", "context_tokens", "rows", "descriptors", "nbytes"}
"""Arguments that are no part of a shape: how much of it is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured kernel: the arguments of its price, seconds, and the spread of repeats as a share of them."""

    kernel: str
    dtype: str
    arguments: tuple[tuple[str, int], ...]
    seconds: float
    spread: float
    drift: float = 0.0  # between passes, as a share

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"{self.kernel} {dict(self.arguments)} took {self.seconds} s; a time must be above 0")

    @property
    def seen(self) -> bool:
        """Whether a fit may use it: two thirds of the shapes, all sizes of a shape alike; the others test the fit."""
        shape = [pair for pair in self.arguments if pair[0] not in _ROWS]
        return crc32(repr(shape).encode()) % 3 > 0


@dataclass(frozen=True, slots=True)
class Columns:
    """Samples of one kernel and type, as arrays."""

    samples: tuple[Sample, ...]

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array([dict(sample.arguments)[name] for sample in self.samples])

    @property
    def seconds(self) -> np.ndarray:
        """Measured seconds."""
        return np.array([sample.seconds for sample in self.samples])


def chosen(samples: Sequence[Sample], kernel: str, dtype: str = "", *, seen: bool | None = None) -> Columns:
    """The samples of a kernel and type; those that a fit may see, or may not, where that is asked."""
    return Columns(
        tuple(
            one for one in samples if one.kernel == kernel and one.dtype == dtype and (seen is None or one.seen == seen)
        )
    )


def joined(passes: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Samples of several passes over the same shapes: geometric means of their times, the largest spread and drift."""
    found = []
    for group in zip(*passes, strict=True):
        if len({(one.kernel, one.dtype, one.arguments) for one in group}) > 1:
            raise ValueError(f"passes measured different shapes: {group[0].arguments} and {group[1].arguments}")
        times = [one.seconds for one in group]
        found.append(
            Sample(
                kernel=group[0].kernel,
                dtype=group[0].dtype,
                arguments=group[0].arguments,
                seconds=math.exp(sum(map(math.log, times)) / len(times)),
                spread=max(one.spread for one in group),
                drift=max(max(times) / min(times) - 1, *(one.drift for one in group)),
            )
        )
    return found
