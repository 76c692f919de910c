"""How evenly tenants were served: the service of each, and Jain's index of it.

The service of a request is what arXiv:2401.00588 counts: its prompt's tokens that were computed (not those found in a
prefix cache) and its output's, each at a weight. Over a whole run a tenant that asks for little gets little, whoever
schedules; fairness shows while tenants compete. So there is a second index, over the time in which a tenant and at
least one other wait at the same replica.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvsim.scenario.tenants import Tenant

Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenancy:
    """What a run knows of its tenants; who is not among the terms has the default ones."""

    terms: dict[str, Tenant] = field(default_factory=dict)
    slo_classes: dict[str, dict[str, float]] = field(default_factory=dict)
    prompt_token_weight: float = 1.0
    output_token_weight: float = 2.0
    kv_peak_bytes: dict[str, int] = field(default_factory=dict)  # at any replica, where tenants are told apart

    def of(self, name: str) -> Tenant:
        """A tenant's terms."""
        return self.terms.get(name, Tenant())

    def bounds(self, name: str, others: Mapping[str, float]) -> dict[str, float]:
        """The SLO of a tenant: its class's bounds, or `others` where it has no class."""
        slo_class = self.of(name).slo_class
        return dict(others if slo_class is None else self.slo_classes[slo_class])


def jain_index(shares: Floats, counts: Floats) -> float | None:
    """E[x]^2 / E[x^2] of shares, of which each counts so often: 1 when all are equal, 1/n when one of n has everything.

    None when all are 0. Source: Jain, Chiu, Hawe, A Quantitative Measure of Fairness, DEC-TR-301, 1984.
    """
    squares = float(counts.sum()) * float((counts * shares**2).sum())
    return float((counts * shares).sum()) ** 2 / squares if squares else None


def fairness(requests: Mapping[str, Array], names: list[str], members: Array, tenancy: Tenancy) -> dict[str, Any]:
    """Jain's indices of a run, and for each of its tenants (`names`, by `members` of the rows) its service.

    `jain_index` is of service / weight over all tenants. `contended_jain_index` is of the rate of that in
    `contended_s`, the seconds, summed over replicas, in which a tenant and another have requests there that were not
    admitted yet. There a tenant counts for as long as it contends, E[x]^2 / E[x^2] over time, so that one whose request
    waited once for an instant tells little; it is None when nobody contends.
    """
    weights = np.array([tenancy.of(name).weight for name in names])
    done = requests["status"] == "finished"
    computed = (requests["prompt_tokens"] - requests["cached_tokens"]) * tenancy.prompt_token_weight
    total = computed + requests["output_tokens"] * tenancy.output_token_weight
    service = np.bincount(members[done], weights=total[done], minlength=len(names))
    contended_s, contended_service = np.zeros(len(names)), np.zeros(len(names))
    if len(names) > 1:
        for replica in np.unique(requests["replica"]):
            rows = np.flatnonzero(requests["replica"] == replica)
            own = {name: column[rows] for name, column in requests.items() if name in _NEEDED}
            _contend(own, members[rows], tenancy, contended_s, contended_service)
    rates = np.divide(contended_service / weights, contended_s, out=np.zeros(len(names)), where=contended_s > 0)
    return {
        "jain_index": jain_index(service / weights, np.ones(len(names))),
        "contended_jain_index": jain_index(rates, contended_s),
        "tenants": {
            name: {
                "service": float(service[i]),
                "weighted_service": float(service[i] / weights[i]),
                "contended_s": float(contended_s[i]),
                "contended_service": float(contended_service[i]),
            }
            for i, name in enumerate(names)
        },
    }


PREFILL, DECODE = ("admitted_s", "first_token_s"), ("first_token_s", "finish_s")
_NEEDED = (
    "arrival_s",
    "timed_out_s",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    *dict.fromkeys(PREFILL + DECODE),
)


def _contend(requests: Mapping[str, Array], members: Array, tenancy: Tenancy, seconds: Floats, service: Floats) -> None:
    """Add what the tenants of one replica had while they contended.

    A prompt is taken as evenly spread over its prefill, an output from its first token to its last.
    """
    arrival_s, admitted_s = requests["arrival_s"], requests["admitted_s"]
    if "timed_out_s" in requests:
        admitted_s = np.where(np.isnan(admitted_s), requests["timed_out_s"], admitted_s)  # until when they queued
    waited = admitted_s > arrival_s  # not so for those that were rejected
    backlogs = {}
    for tenant in np.unique(members[waited]):
        rows = waited & (members == tenant)
        backlogs[tenant] = _union(arrival_s[rows], admitted_s[rows])
    if len(backlogs) < 2:
        return
    starts, stops = (np.concatenate(ends) for ends in zip(*backlogs.values(), strict=True))
    times = np.concatenate([starts, stops])
    order = np.argsort(times, kind="stable")
    times, steps = times[order], np.repeat([1, -1], len(starts))[order]
    several = np.cumsum(steps) > 1  # from each time on, more than one tenant is backlogged
    passed_s = np.concatenate([[0.0], np.cumsum(np.diff(times) * several[:-1])])
    for tenant, (begins, ends) in backlogs.items():
        own = members == tenant
        until_s = _Contention(times, passed_s, begins, ends)
        seconds[tenant] += until_s(ends[-1:])[0]
        for tokens, weight, since, until in (
            (requests["prompt_tokens"] - requests["cached_tokens"], tenancy.prompt_token_weight, *PREFILL),
            (requests["output_tokens"], tenancy.output_token_weight, *DECODE),
        ):
            rows = own & (requests[until] > requests[since])
            first_s, last_s = requests[since][rows], requests[until][rows]
            shares = (until_s(last_s) - until_s(first_s)) / (last_s - first_s)
            service[tenant] += weight * float((tokens[rows] * shares).sum())


class _Contention:
    """Seconds up to a time in which a tenant, backlogged from `begins` to `ends`, contends.

    `passed_s` are those in which any tenants do, at `times`, linear in between.
    """

    def __init__(self, times: Floats, passed_s: Floats, begins: Floats, ends: Floats) -> None:
        self.times, self.passed_s, self.begins, self.ends = times, passed_s, begins, ends
        each_s = self._passed(ends) - self._passed(begins)
        self.before_s = np.cumsum(each_s) - each_s

    def _passed(self, at_s: Floats) -> Floats:
        return np.interp(at_s, self.times, self.passed_s)

    def __call__(self, at_s: Floats) -> Floats:
        k = np.maximum(0, np.searchsorted(self.begins, at_s, side="right") - 1)
        inside_s = self._passed(np.clip(at_s, self.begins[k], self.ends[k])) - self._passed(self.begins[k])
        return np.asarray(self.before_s[k] + inside_s)


def _union(starts: Floats, stops: Floats) -> tuple[Floats, Floats]:
    """The union of intervals as disjoint ones, in order."""
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], stops[order]
    latest = np.maximum.accumulate(stops)
    first = np.concatenate([[True], starts[1:] > latest[:-1]])
    return starts[first], latest[np.concatenate([first[1:], [True]])]
