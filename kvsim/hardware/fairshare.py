"""Flows that share links max-min fairly, as fluids: on every arrival and departure all rates are settled anew."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import simpy

NEGLIGIBLE = 1e-12  # of an amount or a capacity


def max_min_rates(
    caps: Sequence[float], uses: Sequence[Mapping[str, float]], capacities: Mapping[str, float]
) -> list[float]:
    """The max-min fair rate of each flow, by progressive filling.

    Flow i runs at most at `caps[i]` and takes `uses[i][r]` of resource r for each unit of its rate.
    """
    rates, left, rising = [0.0] * len(caps), dict(capacities), set(range(len(caps)))
    while rising:
        demand: dict[str, float] = {}
        for i in rising:
            for resource, share in uses[i].items():
                demand[resource] = demand.get(resource, 0.0) + share
        rise = min(caps[i] - rates[i] for i in rising)
        rise = min([rise, *(left[r] / total for r, total in demand.items() if total > 0)])
        for i in rising:
            rates[i] += rise
        for resource, total in demand.items():
            left[resource] -= rise * total
        full = {r for r in demand if left[r] <= NEGLIGIBLE * capacities[r]}
        stopped = {i for i in rising if caps[i] - rates[i] <= NEGLIGIBLE * caps[i] or full & uses[i].keys()}
        rising -= stopped
    return rates


@dataclass(slots=True, eq=False)
class _Flow:
    left: float
    cap: float
    uses: Mapping[str, float]
    done: simpy.Event
    rate: float = 0.0


class FairShare:
    """The shared resources of one host."""

    def __init__(self, env: simpy.Environment, capacities: Mapping[str, float]) -> None:
        self.env, self.capacities = env, dict(capacities)
        self._flows: list[_Flow] = []
        self._settled_s = 0.0
        self._version = 0

    def flow(self, amount: float, cap: float, uses: Mapping[str, float]) -> simpy.Event:
        """Start moving `amount` at no more than `cap` per second; the event fires when all of it has moved.

        Raises ValueError for a resource that does not exist.
        """
        if unknown := uses.keys() - self.capacities.keys():
            raise ValueError(f"unknown resource {sorted(unknown)}; known: {', '.join(self.capacities)}")
        done = self.env.event()
        if amount <= 0:
            return done.succeed()
        self._progress()
        self._flows.append(_Flow(amount, cap, uses, done))
        self._settle()
        return done

    def stop(self, done: simpy.Event) -> None:
        """Let what would end with this event move no further; nobody is told."""
        self._progress()
        self._flows = [flow for flow in self._flows if flow.done is not done]
        self._settle()

    def _progress(self) -> None:
        elapsed = self.env.now - self._settled_s
        for flow in self._flows:
            flow.left -= flow.rate * elapsed
        self._settled_s = self.env.now

    def _settle(self) -> None:
        rates = max_min_rates([f.cap for f in self._flows], [f.uses for f in self._flows], self.capacities)
        for flow, rate in zip(self._flows, rates, strict=True):
            flow.rate = rate
        self._version += 1
        if self._flows:
            version = self._version
            first = min(self._flows, key=lambda f: f.left / f.rate)
            due = self.env.timeout(max(0.0, first.left / first.rate))
            due.callbacks.append(lambda _: self._complete(version, first))

    def _complete(self, version: int, first: _Flow) -> None:
        if version != self._version:
            return  # rates have changed since
        self._progress()
        first.left = 0.0
        over = [f for f in self._flows if f.left <= NEGLIGIBLE * f.rate]
        self._flows = [f for f in self._flows if f.left > NEGLIGIBLE * f.rate]
        self._settle()
        for flow in over:
            flow.done.succeed()
