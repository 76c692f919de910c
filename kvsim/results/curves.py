"""Quantities over time as curves that are linear between their points, where two points of one time are a jump."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Curve = tuple[NDArray[Any], NDArray[Any]]
"""Times in seconds, ascending, and the value at each."""


def total(curves: Sequence[Curve], also_at_s: ArrayLike = ()) -> tuple[Floats, Floats]:
    """Times in seconds and the sum of `curves`, each of which keeps its first and last value outside its own times.

    Every time of a curve, and those of `also_at_s`, stands twice: with the value before and after a jump.
    """
    times_s = np.unique(np.concatenate([*(x for x, _ in curves), np.asarray(also_at_s, np.float64)]))
    before, after = np.zeros(len(times_s)), np.zeros(len(times_s))
    for x, y in curves:
        # np.interp takes the last of equal x; mirrored, the first.
        after += np.interp(times_s, x, y)
        before += np.interp(-times_s, -x[::-1], y[::-1])
    return np.repeat(times_s, 2), np.column_stack([before, after]).ravel()


def peak_and_mean(curves: Sequence[Curve], start_s: float, end_s: float) -> tuple[int, float]:
    """The largest value of the sum of `curves`, at any time, and its mean from `start_s` to `end_s`."""
    times_s, values = total(curves, [start_s, end_s])
    inside = (start_s <= times_s) & (times_s <= end_s)
    span_s = end_s - start_s
    area = np.trapezoid(values[inside], times_s[inside])
    return int(values.max()), float(area / span_s if span_s else values[inside][-1])
