"""How a plan stands where things turn out otherwise: its fleet is simulated so, and sized anew where it breaks."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvsim.planning.candidates import Family
from kvsim.planning.changes import PRICE, Change, changes
from kvsim.planning.findings import Findings
from kvsim.planning.measured import Ask, Measured
from kvsim.planning.search import smallest
from kvsim.planning.simulations import Failed, Key, Simulations, Task
from kvsim.planning.sizes import Sizes
from kvsim.planning.slo import Objective
from traces import Trace


class WhatIf:
    """Rows of what becomes of a plan's fleet under each change, and how many simulations that took."""

    def __init__(self, ask: Ask, most_gpus: int, fixed_gpus: int | None, progress: Callable[[int], None]) -> None:
        self._ask, self._most_gpus, self._fixed_gpus, self._progress = ask, most_gpus, fixed_gpus, progress
        self.rows: list[dict[str, Any]] = []
        self.made, self.cpu_s = 0, 0.0

    def run(self, findings: Findings, trace: Trace) -> None:
        """Simulate every change on the answer's fleet, with the first seed's trace; there must be an answer."""
        answer = findings.found.answer
        if answer is None:
            return
        best, family = findings.best(answer), findings.families[answer]
        if best.prompts:
            family = replace(family, prefill_share=best.prompts / best.replicas)
        asked = list(changes(family, trace))
        run = [change for change in asked if change.why_not is None]
        families, traces = [change.family for change in run], [change.trace for change in run]
        with Simulations(families, traces, self._ask, self._progress) as simulations:
            sizes = Sizes(simulations, self._ask.objectives)
            try:
                tasks = [self._sized(sizes, best._replace(family=i, seed=i)) for i in range(len(run))]
                simulations.all(tasks)
            finally:
                self.made, self.cpu_s = simulations.made, simulations.cpu_s
        found = {change.name: self._row(sizes, best._replace(family=i, seed=i)) for i, change in enumerate(run)}
        self.rows = [{**_head(change), **found.get(change.name, _nothing(change.why_not))} for change in asked]

    def _sized(self, sizes: Sizes, own: Key) -> Task[None]:
        """The plan's own fleet; where it breaks, the fewest replicas of it that hold."""
        ratio = sizes.how_far((yield own))
        if ratio <= 1 or self._fixed_gpus is not None:
            return
        most = self._most_gpus // sizes.families[own.family].gpus_each
        start = math.ceil(own.replicas * min(2.0, math.sqrt(ratio)))
        yield from sizes.sized(own.family, smallest(start, own.replicas, most), own.seed)

    def _row(self, sizes: Sizes, own: Key) -> dict[str, Any]:
        family, measured = sizes.families[own.family], sizes.simulations.done[own]
        if isinstance(measured, Failed):
            return _nothing(measured.reason)
        needed = own if measured.ratio(self._ask.objectives) <= 1 else _needed(sizes, own)
        there = None if needed is None else sizes.simulations.done[needed]
        return {
            "holds": measured.ratio(self._ask.objectives) <= 1,
            **_figures(family, own, measured, self._ask.objectives),
            "needed": _figures(family, needed, there, self._ask.objectives)
            if needed is not None and isinstance(there, Measured)
            else None,
            "reason": None,
        }


def price_row(answer: Mapping[str, Any], plans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The plan's GPU dearer by half and all else as it is: an exact product, and what would be cheapest then."""
    usd, cost = answer["usd_per_hour"] * PRICE, answer["cost_per_million_tokens"] * PRICE
    others = [row for row in plans if row["feasible"] and row["gpu"] != answer["gpu"] and row["usd_per_hour"] < usd]
    instead = min(others, key=lambda row: row["usd_per_hour"], default=None)
    keys = ("policy", "gpu", "gpus", "prefill_gpus", "options", "usd_per_hour", "cost_per_million_tokens")
    figures = {
        "gpus": answer["gpus"],
        "prefill_gpus": answer["prefill_gpus"],
        "usd_per_hour": usd,
        "cost_per_million_tokens": cost,
        "slo": {name: bound["value_s"] for name, bound in answer["slo"].items()},
        "cached_share": answer["cached_share"],
    }
    return {
        "change": "price +50 %",
        "made_by": f"{answer['gpu']} at one and a half times its price, all other prices as they are",
        "method": "scaled",
        "holds": answer["feasible"],
        **figures,
        "needed": figures,
        "reason": None,
        "instead": None if instead is None else {key: instead[key] for key in keys},
    }


def _head(change: Change) -> dict[str, Any]:
    method = "simulated" if change.why_not is None else "not simulated"
    return {"change": change.name, "made_by": change.made_by, "method": method}


def _nothing(reason: str | None) -> dict[str, Any]:
    """A row of a change that could not be simulated."""
    keys = ("holds", "gpus", "prefill_gpus", "usd_per_hour", "cost_per_million_tokens", "cached_share", "needed")
    return {**dict.fromkeys(keys), "slo": {}, "reason": reason}


def _needed(sizes: Sizes, own: Key) -> Key | None:
    """The fewest replicas that hold; None where none does, or where the size is fixed."""
    replicas = sizes.holds(own.family)
    return None if replicas is None else sizes.key(own.family, replicas, seed=own.seed)


def _figures(family: Family, key: Key, measured: Measured, objectives: Sequence[Objective]) -> dict[str, Any]:
    fleet, usd = family.fleet(key.replicas, key.prompts), family.usd_per_hour(key.replicas)
    rate = measured.output_tokens_per_s
    values_s = {one.name: measured.values_s[one.name] for one in objectives}
    return {
        "gpus": fleet.gpus,
        "prefill_gpus": fleet.prefill_gpus,
        "usd_per_hour": usd,
        "cost_per_million_tokens": usd / 3600 / rate * 1e6 if rate > 0 else None,
        "slo": {name: value_s if math.isfinite(value_s) else None for name, value_s in values_s.items()},
        "unserved": measured.unserved,
        "cached_share": measured.cached_tokens / measured.prompt_tokens if measured.prompt_tokens else 0.0,
    }
