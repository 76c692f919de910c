"""The points of a sweep: every combination of some options' values, or values drawn at random."""

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvsim.scenario.options import Option
from kvsim.scenario.scenario_file import OPTIONS
from kvsim.text.names import unknown_name
from policies.shown import shown

MOST_POINTS = 1_000_000
_FIXED = {
    "seeds": "sweep the key seed instead: --over seed=0,1,2",
    "perfetto": "simulate a point of it alone",
}
_WITH_UNITS = re.compile(r"\d[\w.]*?\.\.\d.*")  # a span of amounts, not a path such as ../mine.yaml
_WORDS = {"true": True, "false": False, "yes": True, "no": False}


class Span(NamedTuple):
    """Numbers to draw from, both ends included; `log`: each factor is as likely as any other, not each step."""

    low: float
    high: float
    whole: bool
    log: bool

    def draw(self, source: random.Random) -> int | float:
        """One of them."""
        if self.log:
            low = math.log(self.low - 0.5 if self.whole and self.low > 1 else self.low)
            found = math.exp(source.uniform(low, math.log(self.high + 0.5 if self.whole else self.high)))
        else:
            found = source.uniform(self.low, self.high) if not self.whole else source.randint(*self._whole_ends())
        if not self.whole:
            return min(max(found, self.low), self.high)
        return min(max(round(found), int(self.low)), int(self.high))

    def _whole_ends(self) -> tuple[int, int]:
        return int(self.low), int(self.high)


Dimension = Sequence[Any] | Span
"""The values of one option, as a scenario file would hold them, or what they are drawn from."""


def dimensions(texts: Sequence[str]) -> dict[str, Dimension]:
    """The dimensions that texts such as `gpus=1,2,4` state, by the options' keys, in their order.

    A key that is said again goes on. Options whose values have commas of their own (policies, SLOs, counts, tenants)
    take one value each time. `max_num_seqs=16..256` and `rate_scale=0.1..10:log` are spans. Raises ValueError for
    unknown keys, values that an option cannot be, and values that are said twice.
    """
    known = {one.key: one for one in OPTIONS}
    found: dict[str, Dimension] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not values:
            raise ValueError(f"--over {shown(text)} must be written KEY=VALUE,VALUE,... with a key of a scenario file")
        if key not in known:
            raise unknown_name("option", key, known)
        if key in _FIXED:
            raise ValueError(f"--over {key} is no dimension of a sweep: {_FIXED[key]}")
        before, new = found.get(key, ()), _values(known[key], values)
        if isinstance(before, Span) or (before and isinstance(new, Span)):
            raise ValueError(f"--over {key} has a span and other values; say one of them")
        found[key] = new if isinstance(new, Span) or isinstance(before, Span) else [*before, *new]
        if not isinstance(new, Span) and (twice := _twice(found[key])) is not None:
            raise ValueError(f"--over {key} has {shown(str(twice))} twice; say each value once")
    return found


def points(over: Mapping[str, Dimension], draws: int | None, seed: int) -> list[dict[str, Any]]:
    """What each point has of the dimensions: all combinations, the last one changing first, or so many drawn ones.

    Raises ValueError where spans are to be combined, or the points are none or above a million.
    """
    spans = [key for key, values in over.items() if isinstance(values, Span)]
    if draws is None and spans:
        raise ValueError(f"--over {spans[0]} is a span, which has no end of values: say how many points with --draw N")
    number = draws if draws is not None else math.prod(len(values) for values in over.values())
    if not over or not 1 <= number <= MOST_POINTS:
        raise ValueError(f"a sweep has 1 to {MOST_POINTS:,} points, not {number:,}: name its dimensions with --over")
    if draws is None:
        return [dict(zip(over, values, strict=True)) for values in itertools.product(*map(list, over.values()))]
    source = random.Random(seed)  # noqa: S311 - a design, no secret
    return [
        {key: one.draw(source) if isinstance(one, Span) else source.choice(one) for key, one in over.items()}
        for _ in range(draws)
    ]


def _values(one: Option, text: str) -> Dimension:
    if one.kind.gathers is not None:
        return [one.kind.gathers([text])]
    if ".." in text and one.kind.flag in (int, float):
        return _span(one, text)
    if one.kind.flag is str and _WITH_UNITS.fullmatch(text):
        raise ValueError(f"--over {one.key}={shown(text)}: only options that are plain numbers have spans; list values")
    return [_plain(one, part.strip()) for part in text.split(",")]


def _plain(one: Option, text: str) -> Any:
    """A value as a scenario file holds it; text stays for the file's own rules."""
    try:
        return _WORDS[text.lower()] if one.kind.flag is bool else one.kind.flag(text)
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[one.kind.flag]
        raise ValueError(f"--over {one.key}: {shown(text)} is not {kind}") from None


def _span(one: Option, text: str) -> Span:
    ends, _, scale = text.partition(":")
    low, high = (_plain(one, end.strip()) for end in ends.split("..", 1))
    if scale not in ("", "log"):
        raise ValueError(f"--over {one.key}={shown(text)}: {shown(scale)} is no scale of a span; :log is one")
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (scale and low <= 0):
        rule = "above zero and rising" if scale else "finite and rising"
        raise ValueError(f"--over {one.key}={shown(text)}: the ends of this span must be {rule}")
    return Span(low, high, one.kind.flag is int, bool(scale))


def _twice(values: Dimension) -> Any:
    kept = list(values)
    return next((value for i, value in enumerate(kept) if value in kept[:i]), None)
