"""The largest load that a fleet holds, and how it fares at other loads."""

import math

from kvsim.planning.findings import Findings
from kvsim.planning.search import Bracket, Search, largest
from kvsim.planning.simulations import LOAD_STEP, Key, Task, one

_LEAST_LOAD = 28  # LOAD_STEPs below the trace's load: a quarter of it
_MOST_LOAD = 60  # LOAD_STEPs: some nineteen times the load
_CURVE = (-14, -6, 0, 2, 4)  # LOAD_STEPs: half of the trace's load, three quarters, its own, 10 % and 22 % more


def rate_scale(load: int) -> float:
    """How many times as fast requests arrive after so many LOAD_STEPs."""
    return float(LOAD_STEP**load)


def seek_load(findings: Findings, *, every_split: bool) -> None:
    """The largest load that the answer's fleet holds, or the nearest fleet where there is no answer.

    With `every_split` (of a size that is fixed) that of every split that was tried: the answer is the one of the
    cheapest GPUs that holds most.
    """
    found, done = findings.found, findings.simulations.done
    chosen = found.answer if found.answer is not None else findings.nearest()
    tried = [] if chosen is None else [findings.best(chosen)]
    if every_split:
        tried = [key for key in done if not (key.load or key.seed)]
    ratios = {key: findings.how_far(done[key]) for key in tried}
    tried = [key for key in tried if math.isfinite(ratios[key])]
    if not tried:
        return
    loads = findings.simulations.all([_loaded(findings, key, _search_from(ratios[key])) for key in tried])

    def rank(number: int) -> tuple[float, float, float, int]:
        key, most = tried[number], loads[number].holds
        usd = findings.families[key.family].usd_per_hour(key.replicas) if ratios[key] <= 1 else math.inf
        return -usd, -math.inf if most is None else most, -ratios[key], -number

    found.loads = dict(zip(tried, loads, strict=True))
    best = max(range(len(tried)), key=rank)
    family, replicas, prompts, *_ = tried[best]
    found.load, found.prompts[family, replicas] = loads[best], prompts
    if found.answer is not None:
        found.answer = family
    else:
        found.nearest = family


def trace_curves(findings: Findings) -> None:
    """Play the best fleet of each policy and cache on the chosen GPU at other loads, on the first seed's trace."""
    chosen = findings.found.answer if findings.found.answer is not None else findings.nearest()
    if chosen is None:
        return
    gpu = findings.families[chosen].gpu
    fleets = [findings.best(i) for i in findings.best_of_lines() if findings.families[i].gpu == gpu]
    findings.simulations.all([one(key._replace(load=load)) for key in fleets for load in _CURVE])


def _search_from(ratio: float) -> Search:
    """The search for the largest load of a fleet: from the trace's own up where that holds, else down."""
    return largest(1, 0, _MOST_LOAD) if ratio <= 1 else largest(-4, -_LEAST_LOAD, 0)


def _loaded(findings: Findings, key: Key, search: Search) -> Task[Bracket]:
    """A bracket of a fleet's load."""
    load = next(search)
    while True:
        measured = yield key._replace(load=load)
        try:
            load = search.send(findings.how_far(measured))
        except StopIteration as end:
            found: Bracket = end.value
            return found
