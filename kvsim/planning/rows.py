"""The rows of a plan's document: a fleet, what it has of the SLO, what breaks with one replica fewer."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsim.planning import launch
from kvsim.planning.candidates import Misfit
from kvsim.planning.curves import curve_of
from kvsim.planning.findings import Findings
from kvsim.planning.measured import Measured, over_seeds
from kvsim.planning.quality import NOT_MEASURED
from kvsim.planning.search import Bracket
from kvsim.planning.simulations import Failed
from kvsim.planning.sources import kinds_of
from traces import Trace

if TYPE_CHECKING:
    from kvsim.planning.question import Question


def row_of(
    question: "Question", findings: Findings, index: int, traces: Sequence[Trace], context_tokens: int
) -> dict[str, Any]:
    """A family's best fleet: its size, costs, quality, what it has of each objective, and where figures come from."""
    family, bracket = findings.families[index], findings.found.brackets[index]
    replicas = bracket.best
    runs = _runs(findings, index, replicas, len(traces))
    feasible = bracket.holds is not None
    best = findings.best(index)
    setup = family.fleet(replicas, best.prompts)
    row: dict[str, Any] = {
        "policy": family.policy,
        "gpu": family.gpu,
        "gpus": setup.gpus,
        "replicas": replicas,
        "tp": setup.tp,
        "pp": setup.pp,
        "prefill_gpus": setup.prefill_gpus,
        "options": [*family.options],
        "feasible": feasible,
        "binding": None,
        "slo": {},
        "quality": question.qualities.of(family.policy, context_tokens),
        "cost_per_million_tokens": None,
        "usd_per_hour": family.usd_per_hour(replicas),
        "kwh_per_million_tokens": None,
        "pareto": False,
    }
    intervals_s = findings.found.intervals_s.get(best, {})
    if runs:
        first = runs[0]
        row["slo"] = {one.name: _bound(one.name, one.limit_s, runs, intervals_s) for one in question.objectives}
        row["binding"] = first.binding(question.objectives)
        tokens_per_s = math.fsum(one.output_tokens_per_s for one in runs) / len(runs)
        if tokens_per_s > 0:
            row["cost_per_million_tokens"] = row["usd_per_hour"] / 3600 / tokens_per_s * 1e6
            watts = family.price.watts
            if watts is not None:
                kwh_per_s = setup.gpus * watts / 1000 / 3600
                row["kwh_per_million_tokens"] = kwh_per_s / tokens_per_s * 1e6
        row["output_tokens_per_s"] = tokens_per_s
        row["goodput_rps"] = math.fsum(one.good_rps for one in runs) / len(runs)
        row["unserved"] = max(one.unserved for one in runs)
        row["cached_share"] = first.cached_tokens / first.prompt_tokens if first.prompt_tokens else 0.0
        row["bottleneck"] = first.bottleneck
        row["seeds"] = len(runs)
    failed = findings.simulations.done.get(best)
    if isinstance(failed, Failed):
        row["reason"] = failed.reason
    row["curve"] = curve_of(question, findings, best, traces[0])
    row["fewer"] = _fewer(question, findings, index, bracket, len(traces))
    if feasible and row["fewer"]:
        row["binding"] = row["fewer"]["binding"] or row["binding"]
    classes = question.class_bounds()
    row["sources"] = kinds_of(family, row["quality"])
    row["simulate"] = launch.simulate_command(
        question.given, family, setup, question.bounds, classes, question.scenario
    )
    return row


def _runs(findings: Findings, index: int, replicas: int, seeds: int) -> list[Measured]:
    """What was simulated of a fleet, the first seed first; that alone where not all seeds were."""
    runs = [findings.simulations.done.get(findings.key(index, replicas, seed=seed)) for seed in range(seeds)]
    known = [one for one in runs if isinstance(one, Measured)]
    return known if len(known) == seeds else [one for one in runs[:1] if isinstance(one, Measured)]


def _bound(
    name: str, limit_s: float, runs: Sequence[Measured], intervals_s: Mapping[str, tuple[float, float]]
) -> dict[str, float | None]:
    """Of several seeds the mean and Student's t interval; of one its value, and the interval of resampled requests."""
    if len(runs) > 1:
        value_s, low_s, high_s = over_seeds(runs, name)
        found = {"value_s": value_s, "low_s": low_s, "high_s": high_s}
    else:
        low_s, high_s = intervals_s.get(name, (math.nan, math.nan))
        found = {"value_s": runs[0].values_s[name], "low_s": low_s, "high_s": high_s}
    known = {key: value if math.isfinite(value) else None for key, value in found.items()}
    return {"limit_s": limit_s, **known}


def _fewer(question: "Question", findings: Findings, index: int, bracket: Bracket, seeds: int) -> dict[str, Any] | None:
    """The fleet of one replica fewer that came nearest, however it was split up, and what breaks there.

    None where there is none, or where none was simulated.
    """
    if bracket.holds is None or bracket.holds == 1:
        return None
    like = findings.families[index]
    tried = []
    for i, family in enumerate(findings.families):
        alike = family.line == like.line and (family.setup.tp, family.setup.pp) == (like.setup.tp, like.setup.pp)
        runs = _runs(findings, i, bracket.holds - 1, seeds) if alike else []
        if runs:
            tried.append((max(one.ratio(question.objectives) for one in runs), i, runs))
    if not tried:
        return None
    same = {(i, bracket.holds - 1) for _, i, _ in tried}
    _, nearest, runs = min(tried, key=lambda one: one[:2])
    best = findings.key(nearest, bracket.holds - 1)
    fleet = findings.families[nearest].fleet(best.replicas, best.prompts)
    worst = max(runs, key=lambda one: one.ratio(question.objectives))
    return {
        "gpus": fleet.gpus,
        "prefill_gpus": fleet.prefill_gpus,
        "splits_tried": len({key.prompts for key in findings.simulations.done if key[:2] in same and not key.load}),
        "binding": worst.binding(question.objectives),
        "slo": {one.name: _bound(one.name, one.limit_s, [worst], {}) for one in question.objectives},
    }


def misfit_row(one: Misfit) -> dict[str, Any]:
    """A candidate that cannot serve, with the reason."""
    return {
        "policy": one.policy,
        "gpu": one.gpu,
        "gpus": None,
        "tp": one.tp,
        "pp": one.pp,
        "prefill_gpus": 0,
        "options": [*one.options],
        "feasible": False,
        "binding": "memory",
        "slo": {},
        "quality": NOT_MEASURED,
        "cost_per_million_tokens": None,
        "curve": [],
        "reason": one.reason,
    }
