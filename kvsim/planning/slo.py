"""Service-level objectives: bounds of a statistic of a latency, over all requests or over those of an SLO class."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsim.results.summary import Result, finished, latencies
from kvsim.scenario.choices import LATENCIES
from kvsim.scenario.tenants import Tenant, terms_of
from kvsim.text.names import unknown_name
from kvsim.text.units import parse_duration_s
from policies.shown import shown

RANKS = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
STATISTICS = ("mean", *RANKS)
NAMES = tuple(f"{latency.removesuffix('_s')}_{statistic}" for latency in LATENCIES for statistic in STATISTICS)
EXAMPLE = "ttft_p99=10s,tpot_p99=100ms"


class Objective(NamedTuple):
    """One bound: `statistic` of `latency` must not exceed `limit_s`, over all requests where `slo_class` is None."""

    latency: str  # one of LATENCIES
    statistic: str  # one of STATISTICS
    limit_s: float
    slo_class: str | None = None

    @property
    def name(self) -> str:
        """As it is written: `ttft_p99`, or `chat:ttft_p99`."""
        bare = f"{self.latency.removesuffix('_s')}_{self.statistic}"
        return bare if self.slo_class is None else f"{self.slo_class}:{bare}"

    def of(self, values: NDArray[np.float64]) -> float:
        """The statistic of latencies, NaN left out; infinite where there is none. Nearest ranks, as in summaries."""
        known = values[~np.isnan(values)]
        if not len(known):
            return math.inf
        if self.statistic == "mean":
            return float(np.sort(known).sum() / len(known))  # in the summary's order, to the last bit
        rank = -(-len(known) * RANKS[self.statistic] // 100)
        return float(np.partition(known, rank - 1)[rank - 1])


def parse_slo(texts: str | Sequence[str]) -> tuple[Objective, ...]:
    """Objectives as people write them: `ttft_p99=10s,tpot_p99=100ms`, for the requests of a class `chat:ttft_p99=2s`.

    A class holds up to the end of its text or up to the next class. Raises ValueError for what names no objective, for
    bounds that are no time above 0, and for what is said twice.
    """
    found: dict[str, Objective] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        slo_class: str | None = None
        for item in text.split(","):
            named, equals, bound = item.strip().partition("=")
            if not equals:
                raise ValueError(f"--slo {shown(item)} must be written NAME=TIME, such as {EXAMPLE}")
            before, colon, name = named.rpartition(":")
            slo_class = before if colon else slo_class
            if colon and not before:
                raise ValueError(f"--slo {shown(item)} names no class before its colon; write chat:ttft_p99=2s")
            one = _objective(name, bound, slo_class)
            if one.name in found:
                raise ValueError(f"--slo gives {shown(one.name)} twice; say it once")
            found[one.name] = one
    if not found:
        raise ValueError(f"a plan needs an SLO to meet: --slo {EXAMPLE}")
    return tuple(found.values())


def _objective(name: str, bound: str, slo_class: str | None) -> Objective:
    if name not in NAMES:
        latency = next((one for one in LATENCIES if name == one.removesuffix("_s")), None)
        if latency is not None:
            raise ValueError(f"--slo {name}={shown(bound)} names no statistic; write {name}_p99 or {name}_mean")
        raise unknown_name("objective of --slo", name, NAMES)
    latency, _, statistic = name.rpartition("_")
    limit_s = parse_duration_s(bound)
    if not 0 < limit_s < math.inf:
        raise ValueError(f"--slo {name}={shown(bound)} must be a time above 0, such as 100ms")
    return Objective(f"{latency}_s", statistic, limit_s, slo_class)


def request_bounds(objectives: Sequence[Objective], slo_class: str | None) -> dict[str, float]:
    """What a single request of a class must keep to count as good: of each latency the loosest bound."""
    bounds: dict[str, float] = {}
    for one in objectives:
        if one.slo_class == slo_class:
            bounds[one.latency] = max(one.limit_s, bounds.get(one.latency, 0.0))
    return bounds


def classes(objectives: Sequence[Objective]) -> list[str]:
    """The classes that objectives name, in order."""
    return list(dict.fromkeys(one.slo_class for one in objectives if one.slo_class is not None))


def members(
    tenants: Mapping[str, Tenant], names: Sequence[str], objectives: Sequence[Objective]
) -> dict[str, list[int]]:
    """For each class the tenants of a trace that it holds for: those of that `slo_class`, else those of that name.

    A name may be a pattern of shells. Raises ValueError for a class that nobody is of.
    """
    terms = terms_of(tenants, names)
    found: dict[str, list[int]] = {}
    for name in classes(objectives):
        own = [index for index, one in enumerate(terms) if one.slo_class == name]
        own = own or [index for index, tenant in enumerate(names) if tenant == name or fnmatchcase(tenant, name)]
        if not own:
            raise unknown_name("class or tenant of --slo", name, [*names])
        found[name] = own
    return found


def samples(
    result: Result,
    objectives: Sequence[Objective],
    of_class: Mapping[str, Sequence[int]],
    names: Sequence[str],
    warmup_s: float,
) -> dict[str, NDArray[np.float64]]:
    """For each objective the latencies that it bounds, a value for each request, NaN where it does not count."""
    columns: dict[str, Any] = {**result.requests}
    counted = finished(result) & (columns["arrival_s"] >= warmup_s)
    times = latencies(result)
    found = {}
    for one in objectives:
        rows = counted
        if one.slo_class is not None:
            own = [names[index] for index in of_class[one.slo_class]]
            rows = counted & np.isin(columns["tenant"].astype(str), own)
        found[one.name] = np.where(rows, times[one.latency], np.nan)
    return found
