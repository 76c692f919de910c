"""The fewest replicas that hold an SLO, and the largest load that a fleet holds: brackets around what breaks.

A search yields the sizes that it wants simulated and is sent how far each is from the SLO: the largest of value / limit
over all objectives, at most 1 where it holds. What it returns was simulated, and so was the size beside it that breaks.
"""

import math
from collections.abc import Generator
from typing import NamedTuple

_STEP = 2.0  # the largest step, up or down
_LEAST_POWER = 0.25  # with which a ratio is taken to fall
_NO_BETTER = 0.98  # a doubling that leaves so much of the distance will not get there


class Bracket(NamedTuple):
    """The smallest size that holds and the largest that breaks, next to each other; None where there is none.

    `best` is the size that came nearest where none holds.
    """

    holds: int | None
    breaks: int | None
    best: int


Search = Generator[int, float, Bracket]


def smallest(start: int, least: int, most: int) -> Search:
    """The smallest size from `least` to `most` that holds, where larger ones hold as well; sizes below `least` do not.

    Steps follow the ratios, taken for a power of the size between two known ones; every step stays within the bracket.
    Where a doubling brings the ratio no nearer to 1, there is no such size.
    """
    ratios: dict[int, float] = {}
    breaks, holds = least - 1, most + 1
    size, halve = min(max(start, least), most), False
    while True:
        ratios[size] = yield size
        if ratios[size] <= 1:
            holds = size
        else:
            breaks = size
        if holds - breaks == 1 or breaks == most or _stuck(ratios, holds, most):
            break
        size, halve = _next(ratios, breaks, holds, least, most, halve), not halve
    best = holds if holds <= most else min(ratios, key=lambda one: (ratios[one], one))
    return Bracket(holds if holds <= most else None, breaks if breaks >= least else None, best)


def largest(start: int, least: int, most: int) -> Search:
    """The largest size that holds, where smaller ones hold as well."""
    search = smallest(-start, -most, -least)
    size = next(search)
    while True:
        ratio = yield -size
        try:
            size = search.send(ratio)
        except StopIteration as end:
            found: Bracket = end.value
            holds, breaks = (None if one is None else -one for one in (found.holds, found.breaks))
            return Bracket(holds, breaks, -found.best)


def _stuck(ratios: dict[int, float], holds: int, most: int) -> bool:
    """Whether the last doubling (on sizes above 0) did not help."""
    if holds <= most or min(ratios) <= 0:
        return False
    last = max(ratios)
    before = max((size for size in ratios if _STEP * size <= last), default=None)
    if before is None or math.isinf(ratios[last]):
        return False
    return math.log(ratios[last]) > _NO_BETTER * math.log(ratios[before])


def _next(ratios: dict[int, float], breaks: int, holds: int, least: int, most: int, halve: bool) -> int:
    """Where to look next, strictly between what breaks and what holds."""
    if breaks >= least and holds <= most:
        return _between(breaks, holds, None if halve else ratios)
    if holds > most:  # nothing holds so far: up
        return min(most, max(breaks + 1, _away(breaks, ratios)))
    return max(least, min(holds - 1, _away(holds, ratios)))


def _away(size: int, ratios: dict[int, float]) -> int:
    """A step from the last size towards where the ratio is 1, as if it went on as between the last two."""
    ratio = ratios[size]
    if size <= 0:  # sizes of a load: they count steps of a few per cent each
        step = 4 << min(2, len(ratios) - 1)
        return size + (step if ratio > 1 else -step)
    power = 2.0
    others = [one for one in ratios if one > 0 and one != size and 0 < ratios[one] < math.inf]
    if others and 0 < ratio < math.inf:
        other = min(others, key=lambda one: abs(one - size))
        power = max(_LEAST_POWER, math.log(ratio / ratios[other]) / math.log(other / size))
    factor = _STEP if math.isinf(ratio) else min(_STEP, max(1 / _STEP, math.pow(ratio, 1 / power)))
    return math.ceil(size * factor) if ratio > 1 else math.floor(size * factor)


def _between(breaks: int, holds: int, ratios: dict[int, float] | None) -> int:
    middle = (breaks + holds) // 2
    if ratios is None or math.isinf(ratios[breaks]) or ratios[holds] <= 0:
        return middle
    above, below = math.log(ratios[breaks]), -math.log(ratios[holds])
    if above + below <= 0:
        return middle
    share = above / (above + below)
    if breaks > 0:  # a power of the size
        found = math.ceil(breaks * math.pow(holds / breaks, share) - 1e-9)
    else:  # sizes of a load are powers already
        found = math.ceil(breaks + (holds - breaks) * share - 1e-9)
    return min(holds - 1, max(breaks + 1, found))
