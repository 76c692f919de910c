"""Every configuration that a plan looked at, ranked: replicas for prompts and decoding together, and apart."""

import math
from typing import Any

from kvsim.planning.findings import Findings
from kvsim.planning.loads import rate_scale
from kvsim.planning.measured import Measured
from kvsim.planning.simulations import Key


def configurations_of(findings: Findings) -> list[dict[str, Any]]:
    """A row for each split of each GPU, policy and cache that was simulated, at its best size; the best comes first.

    What holds comes before what does not, then the cheapest; of a size that is fixed what holds the largest load. On
    the `front` is what no other one beats in both cost and distance from the SLO.
    """
    keys = dict.fromkeys([*findings.found.loads, *(findings.best(i) for i in findings.found.brackets)])
    rows = [row for key in keys if (row := _row(findings, key)) is not None]
    rows.sort(key=_rank)
    for row in rows:
        row["front"] = not any(_beats(other, row) for other in rows)
    return rows


def _row(findings: Findings, key: Key) -> dict[str, Any] | None:
    """None where the simulation could not run, or finished nothing."""
    measured, family = findings.simulations.done.get(key), findings.families[key.family]
    if not isinstance(measured, Measured) or measured.output_tokens_per_s <= 0:
        return None
    fleet, usd = family.fleet(key.replicas, key.prompts), family.usd_per_hour(key.replicas)
    ratio, load = measured.ratio(findings.objectives), findings.found.loads.get(key)
    values_s = {name: value_s if math.isfinite(value_s) else None for name, value_s in measured.values_s.items()}
    return {
        "policy": family.policy,
        "gpu": family.gpu,
        "options": [*family.options],
        "tp": fleet.tp,
        "pp": fleet.pp,
        "gpus": fleet.gpus,
        "prefill_gpus": fleet.prefill_gpus,
        "holds": ratio <= 1,
        "of_limit": ratio if math.isfinite(ratio) else None,
        "slo": values_s,
        "sustained": None if load is None or load.holds is None else rate_scale(load.holds),
        "usd_per_hour": usd,
        "cost_per_million_tokens": usd / 3600 / measured.output_tokens_per_s * 1e6,
        "output_tokens_per_s_per_gpu": measured.output_tokens_per_s / fleet.gpus,
        "front": False,
    }


def _rank(row: dict[str, Any]) -> tuple[bool, float, float, float]:
    sustained = row["sustained"] or 0.0
    return not row["holds"], row["usd_per_hour"] if row["holds"] else 0.0, -sustained, _of_limit(row)


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether one costs no more and is no further from the SLO, and is better in one of these."""
    pairs = [(row["usd_per_hour"], _of_limit(row)) for row in (one, other)]
    return pairs[0] != pairs[1] and all(mine <= theirs for mine, theirs in zip(*pairs, strict=True))


def _of_limit(row: dict[str, Any]) -> float:
    return math.inf if row["of_limit"] is None else float(row["of_limit"])
