"""What a plan keeps of one simulation: the objectives' values, how far they could be off, and what was served."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvsim.planning.slo import RANKS, Objective, samples
from kvsim.plans.derive import Pieces
from kvsim.results.causes import attribution, bottleneck
from kvsim.results.intervals import block_length, bootstrap, t_interval
from kvsim.results.summary import Result, finished, latencies
from kvsim.results.uncertainty import FEWEST_REQUESTS, SAMPLES
from kvsim.run.jobs import Job
from kvsim.run.simulate import simulate
from kvsim.scenario.setup import Setup

Floats = NDArray[np.float64]
_RUNS = 20  # that a process of a plan makes of simulations with the same features, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One simulation, in the figures that a plan needs."""

    values_s: dict[str, float]  # by objective; infinite where no request finished
    samples_s: dict[str, Floats]  # by objective what it bounds, and as `e2e_s` all latencies, in order of arrival
    submitted: int
    finished: int
    good_rps: float
    output_tokens_per_s: float
    prompt_tokens: int
    cached_tokens: int
    makespan_s: float
    bottleneck: str | None
    cpu_s: float = 0.0  # that the simulation took

    @property
    def unserved(self) -> int:
        """Requests that were rejected, timed out or left behind."""
        return self.submitted - self.finished

    def ratio(self, objectives: Sequence[Objective]) -> float:
        """The largest of value / limit; infinite where a request went unserved."""
        if self.unserved:
            return math.inf
        return max(self.values_s[one.name] / one.limit_s for one in objectives)

    def binding(self, objectives: Sequence[Objective]) -> str:
        """The objective whose value is nearest its limit, or furthest above it; `unserved` where requests were."""
        if self.unserved:
            return "unserved"
        return max(objectives, key=lambda one: self.values_s[one.name] / one.limit_s).name


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What to keep of a simulation: objectives, whom their classes hold for, and the bounds of other requests."""

    objectives: tuple[Objective, ...]
    of_class: Mapping[str, Sequence[int]]
    bounds: Mapping[str, float]  # of requests of no class
    warmup_s: float


def measure(job: Job, ask: Ask) -> Measured:
    """Simulate, and keep what is asked. Raises ValueError for what cannot run."""
    began_s = time.process_time()
    found = kept(simulate(job.trace, job.setup, pieces=_pieces_of(job.setup), runs=_RUNS), job.trace.tenants, ask)
    return replace(found, cpu_s=time.process_time() - began_s)


def _pieces_of(setup: Setup) -> Pieces | None:
    """What this process has derived of the same plans before; None where they cannot be told apart."""
    try:
        return _pieces(
            setup.policy, setup.rank, setup.machine(), tuple(sorted(setup.counts.items())), setup.speculation
        )
    except TypeError:  # a policy from outside that has no hash
        return None


@lru_cache(maxsize=32)
def _pieces(*_depends_on: object) -> Pieces:
    return Pieces()


def kept(result: Result, names: Sequence[str], ask: Ask) -> Measured:
    """The figures of a result."""
    columns = result.requests
    own = samples(result, ask.objectives, ask.of_class, names, ask.warmup_s)
    done = finished(result)
    counted = done & (columns["arrival_s"] >= ask.warmup_s)
    span_s = result.makespan_s
    arrival_s = columns["arrival_s"]
    order = np.argsort(arrival_s, kind="stable")[: len(arrival_s) - int(np.isnan(arrival_s).sum())]
    everything = {**own, "e2e_s": np.where(counted, latencies(result)["e2e_s"], np.nan)}
    return Measured(
        values_s={one.name: one.of(own[one.name]) for one in ask.objectives},
        samples_s={name: values[order] for name, values in everything.items()},
        submitted=len(done),
        finished=int(done.sum()),
        good_rps=_good(result, ask) / span_s if span_s > 0 else 0.0,
        output_tokens_per_s=float(columns["output_tokens"][done].sum() / span_s) if span_s > 0 else 0.0,
        prompt_tokens=int(columns["prompt_tokens"][done].sum()),
        cached_tokens=int(columns["cached_tokens"][done].sum()),
        makespan_s=float(span_s),
        bottleneck=bottleneck(attribution(columns, np.flatnonzero(counted))["e2e"]["mean_s"]),
    )


def _good(result: Result, ask: Ask) -> int:
    """Requests that finished within the bounds of their tenant, as goodput counts them."""
    good, times = finished(result), latencies(result)
    tenants, members = np.unique(result.requests["tenant"].astype(str), return_inverse=True)
    bounds = [result.tenancy.bounds(str(name), ask.bounds) for name in tenants]
    for name, values in times.items():
        limits = np.array([own.get(name, math.inf) for own in bounds])
        good &= ~(values > limits[members])
    return int(good.sum())


def resampled(
    samples_s: Mapping[str, Floats], objectives: Sequence[Objective], seed: int
) -> dict[str, tuple[float, float]]:
    """95 % intervals by resampling requests in blocks, drawn as `kvsim simulate --seeds` draws them.

    Without an objective whose figures are not all finite; of few requests there is none.
    """
    e2e_s = samples_s["e2e_s"]
    known = ~np.isnan(e2e_s)
    if known.sum() < FEWEST_REQUESTS:
        return {}
    ascending = {one.name: _ascending(samples_s[one.name]) for one in objectives}

    def figures(times: NDArray[np.int64]) -> list[float]:
        return [_weighted(one, times, *ascending[one.name]) for one in objectives]

    spread = bootstrap(len(e2e_s), block_length(e2e_s[known]), SAMPLES, seed, figures)
    pairs = zip(objectives, spread, strict=True)
    return {one.name: ends for one, ends in pairs if all(map(math.isfinite, ends))}


def _ascending(values: Floats) -> tuple[NDArray[np.intp], Floats]:
    """The rows that have a value, in ascending order of it, and the values."""
    rows = np.argsort(values)[: len(values) - int(np.isnan(values).sum())]
    return rows, values[rows]


def _weighted(one: Objective, times: NDArray[np.int64], rows: NDArray[np.intp], values: Floats) -> float:
    """A statistic where each value counts so often; NaN where none does."""
    weights = times[rows]
    ranks = np.cumsum(weights)
    if not len(ranks) or not ranks[-1]:
        return math.nan
    if one.statistic == "mean":
        return float(weights @ values) / int(ranks[-1])
    return float(values[np.searchsorted(ranks, -(-int(ranks[-1]) * RANKS[one.statistic] // 100))])


def over_seeds(runs: Sequence[Measured], name: str) -> tuple[float, float, float]:
    """Mean of an objective over runs on traces of different seeds, and its interval (Student's t), cut off at 0."""
    values = [one.values_s[name] for one in runs]
    if not all(map(math.isfinite, values)):
        return math.inf, math.inf, math.inf
    found = t_interval(values)
    return found.mean, max(0.0, found.low), found.high
