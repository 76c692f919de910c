"""Runs of decode iterations in closed form: durations that grow evenly, piece by piece, between two events.

Between two events every amount of a batch grows linearly, each operation's time is a maximum of linear functions, and
the makespan adds and maximises those: a convex function of the iteration. So it is linear on an interval as soon as one
inner point lies on the chord, and the run is split exactly where that fails.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Price = Callable[[int], tuple[float, Floats]]
ON_CHORD = 1e-7  # relative distance from the chord that counts as none: settled layers are extrapolated to 1e-9


NOTHING = np.zeros(0)


class Part(NamedTuple):
    """`steps` iterations of `first_s`, `first_s` + `slope_s`, …; `busy` and `busy_slope` grow alike."""

    steps: int
    first_s: float
    slope_s: float
    busy: Floats
    busy_slope: Floats

    def seconds(self, steps: int) -> float:
        """Time of the first `steps` iterations."""
        return steps * self.first_s + self.slope_s * (steps * (steps - 1) // 2)


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive iterations, the first of which starts after `stall_s`."""

    parts: tuple[Part, ...]
    stall_s: float = 0.0

    @classmethod
    def single(cls, seconds: float) -> "Run":
        """One iteration."""
        return cls((Part(1, seconds, 0.0, NOTHING, NOTHING),))

    @property
    def steps(self) -> int:
        """Iterations in all."""
        return sum(part.steps for part in self.parts)

    @property
    def seconds(self) -> float:
        """Time in all."""
        return self.stall_s + sum(part.seconds(part.steps) for part in self.parts)

    def busy(self) -> Floats:
        """Busy seconds of each resource in all."""
        total = np.zeros_like(self.parts[0].busy)
        for part in self.parts:
            total += part.steps * part.busy + (part.steps * (part.steps - 1) // 2) * part.busy_slope
        return total

    def steps_by(self, seconds: float) -> int:
        """The iterations that are done, or under way, `seconds` after the start: at least one."""
        left, done = seconds - self.stall_s, 0
        for part in self.parts:
            if left > part.seconds(part.steps):
                left -= part.seconds(part.steps)
                done += part.steps
                continue
            if left <= part.first_s:
                return done + 1
            steps = min(part.steps, max(1, _root(part, left)))
            while steps > 1 and part.seconds(steps - 1) >= left:
                steps -= 1
            while part.seconds(steps) < left:
                steps += 1
            return done + steps
        return done

    def head(self, steps: int) -> "Run":
        """The first `steps` iterations."""
        parts = []
        for part in self.parts:
            taken = min(steps, part.steps)
            if taken:
                parts.append(part._replace(steps=taken))
            steps -= taken
        return replace(self, parts=tuple(parts))


def price_run(price: Price, steps: int, stall_s: float = 0.0) -> Run:
    """The run of `steps` iterations whose i-th costs `price(i)`; evaluates it only where its slope changes."""
    first = price(0)
    last = price(steps - 1) if steps > 1 else first
    return Run(tuple(_parts(price, 0, first, steps - 1, last)), stall_s)


def _parts(
    price: Price, low: int, at_low: tuple[float, Floats], high: int, at_high: tuple[float, Floats]
) -> list[Part]:
    span = high - low
    slope = (at_high[0] - at_low[0]) / span if span else 0.0
    busy_slope = (at_high[1] - at_low[1]) / span if span else np.zeros_like(at_low[1])
    if span > 1:
        middle = (low + high) // 2
        at_middle = price(middle)
        if abs(at_middle[0] - (at_low[0] + slope * (middle - low))) > ON_CHORD * at_middle[0]:
            after = price(middle + 1)
            return _parts(price, low, at_low, middle, at_middle) + _parts(price, middle + 1, after, high, at_high)
    return [Part(span + 1, at_low[0], slope, at_low[1], busy_slope)]


def _root(part: Part, seconds: float) -> int:
    """About how many iterations of a part take `seconds`: the root of its time, in the form that cancels no digits."""
    half = part.slope_s / 2
    linear = part.first_s - half
    return int(2 * seconds / (linear + sqrt(max(0.0, linear * linear + 4 * half * seconds))))
