"""The document of a plan: the answer, every line's best fleet, why others fail, and where each figure comes from."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsim.planning import launch
from kvsim.planning.candidates import Candidates, Family, Misfit
from kvsim.planning.findings import Estimate
from kvsim.planning.measured import Measured, over_seeds
from kvsim.planning.planner import Planner, rate_scale
from kvsim.planning.quality import NOT_MEASURED, loss_nats
from kvsim.planning.search import Bracket
from kvsim.planning.simulations import Failed
from kvsim.planning.sources import kinds_of, sources_of
from kvsim.text.units import format_s
from traces import Trace

if TYPE_CHECKING:
    from kvsim.planning.question import Question

HEADLINE = ("policy", "gpu", "gpus", "tp", "pp", "prefill_gpus", "options", "cost_per_million_tokens")


def first_answer(family: Family, estimate: Estimate, wall_s: float) -> dict[str, Any]:
    """The estimate by closed forms, as people and machines are told it before anything was simulated."""
    return {
        "policy": family.policy,
        "gpu": family.gpu,
        "gpus": estimate.replicas * family.gpus_each,
        "tp": family.setup.tp,
        "pp": family.setup.pp,
        "prefill_gpus": 0,
        "usd_per_hour": estimate.usd_per_hour,
        "holds": estimate.holds,
        "source": "estimated by closed forms, no simulation",
        "wall_s": wall_s,
    }


def document_of(
    question: "Question", planner: Planner, could: Candidates, traces: Sequence[Trace], context_tokens: int
) -> dict[str, Any]:
    """The document, but for what the clock says."""
    rows = {i: _row(question, planner, i, traces, context_tokens) for i in planner.best_of_lines()}
    _mark_front(list(rows.values()))
    ordered = sorted(rows.values(), key=_order)
    answer, nearest = planner.found.answer, None
    if answer is None:
        nearest = planner.nearest()
    chosen = rows.get(answer) if answer is not None else None
    document: dict[str, Any] = {"sentence": "", "answer": None}
    if chosen is not None and answer is not None:
        load = _load(question, planner, answer, traces)
        document["answer"] = {
            **{name: chosen[name] for name in HEADLINE},
            "headroom": load["headroom"],
            "bottleneck": load["bottleneck"],
            "load": load,
            **{name: value for name, value in chosen.items() if name not in HEADLINE},
            "engines": _engines(question, planner, answer, traces),
            "beside": None if launch.run_by_engines(planner.families[answer]) else _engine_plan(rows, planner),
        }
    if nearest is not None:
        load = _load(question, planner, nearest, traces)
        document["nearest"] = {**_row(question, planner, nearest, traces, context_tokens), "load": load}
    elif answer is None:
        document["nearest"] = None
    document["slo_asked"] = {one.name: one.limit_s for one in question.objectives}
    document["plans"] = [*ordered, *(_misfit(one) for one in could.misfits)]
    document["sources"] = sources_of(question, could, traces[0])
    document["sentence"] = _sentence(question, document)
    return document


def _row(
    question: "Question", planner: Planner, index: int, traces: Sequence[Trace], context_tokens: int
) -> dict[str, Any]:
    family, bracket = planner.families[index], planner.found.brackets[index]
    replicas = bracket.best
    runs = _runs(planner, index, replicas, len(traces))
    feasible = bracket.holds is not None
    best = planner.best(index)
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
    intervals_s = planner.found.intervals_s.get(best, {})
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
    failed = planner.simulations.done.get(best)
    if isinstance(failed, Failed):
        row["reason"] = failed.reason
    row["fewer"] = _fewer(question, planner, index, bracket, len(traces))
    if feasible and row["fewer"]:
        row["binding"] = row["fewer"]["binding"] or row["binding"]
    classes = question.class_bounds()
    row["sources"] = kinds_of(family, row["quality"])
    row["simulate"] = launch.simulate_command(
        question.given, family, setup, question.bounds, classes, question.scenario
    )
    return row


def _runs(planner: Planner, index: int, replicas: int, seeds: int) -> list[Measured]:
    """What was simulated of a fleet, the first seed first; that alone where not all seeds were."""
    runs = [planner.simulations.done.get(planner.key(index, replicas, seed=seed)) for seed in range(seeds)]
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


def _fewer(question: "Question", planner: Planner, index: int, bracket: Bracket, seeds: int) -> dict[str, Any] | None:
    """The fleet of one replica fewer that came nearest, however it was split up, and what breaks there.

    None where there is none, or where none was simulated.
    """
    if bracket.holds is None or bracket.holds == 1:
        return None
    like = planner.families[index]
    tried = []
    for i, family in enumerate(planner.families):
        alike = family.line == like.line and (family.setup.tp, family.setup.pp) == (like.setup.tp, like.setup.pp)
        runs = _runs(planner, i, bracket.holds - 1, seeds) if alike else []
        if runs:
            tried.append((max(one.ratio(question.objectives) for one in runs), i, runs))
    if not tried:
        return None
    same = {(i, bracket.holds - 1) for _, i, _ in tried}
    _, nearest, runs = min(tried, key=lambda one: one[:2])
    best = planner.key(nearest, bracket.holds - 1)
    fleet = planner.families[nearest].fleet(best.replicas, best.prompts)
    worst = max(runs, key=lambda one: one.ratio(question.objectives))
    return {
        "gpus": fleet.gpus,
        "prefill_gpus": fleet.prefill_gpus,
        "splits_tried": len({key.prompts for key in planner.simulations.done if key[:2] in same and not key.load}),
        "binding": worst.binding(question.objectives),
        "slo": {one.name: _bound(one.name, one.limit_s, [worst], {}) for one in question.objectives},
    }


def _load(question: "Question", planner: Planner, index: int, traces: Sequence[Trace]) -> dict[str, Any]:
    """Goodput against offered load, what is the most that holds, and what breaks beyond it."""
    bracket, best = planner.found.load, planner.best(index)
    trace = traces[0]
    span_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
    rate_rps = len(trace) / span_s if span_s > 0 else None
    curve = []
    for key, measured in planner.simulations.done.items():
        if key._replace(load=0) == best and isinstance(measured, Measured):
            curve.append((key.load, measured))
    curve.sort(key=lambda pair: pair[0])
    rows = [
        {
            "rate_scale": rate_scale(load),
            "offered_rps": None if rate_rps is None else rate_rps * rate_scale(load),
            "goodput_rps": one.good_rps,
            "holds": one.ratio(question.objectives) <= 1,
            "binding": one.binding(question.objectives),
            "bottleneck": one.bottleneck,
        }
        for load, one in curve
    ]
    holds = None if bracket is None else bracket.holds
    breaks = None if bracket is None else bracket.breaks
    knee = dict(curve).get(breaks) if breaks is not None else None
    return {
        "headroom": None if holds is None else rate_scale(holds) - 1,
        "holds_at": None if holds is None else rate_scale(holds),
        "breaks_at": None if breaks is None else rate_scale(breaks),
        "breaks": None if knee is None else knee.binding(question.objectives),
        "bottleneck": (knee or dict(curve)[0]).bottleneck if curve and (knee or 0 in dict(curve)) else None,
        "curve": rows,
    }


def _engines(question: "Question", planner: Planner, index: int, traces: Sequence[Trace]) -> dict[str, Any]:
    longest = max(int((trace.prompt_tokens + trace.output_tokens).max()) for trace in traces)
    family, best = planner.families[index], planner.best(index)
    return launch.engines(family, family.fleet(best.replicas, best.prompts), question.asked.model, longest)


def _engine_plan(rows: Mapping[int, dict[str, Any]], planner: Planner) -> dict[str, Any] | None:
    """The cheapest plan that an engine runs today."""
    own = [row for i, row in rows.items() if row["feasible"] and launch.run_by_engines(planner.families[i])]
    return min(own, key=_order, default=None)


def _order(row: Mapping[str, Any]) -> tuple[bool, float, int]:
    return not row["feasible"], row["usd_per_hour"] if row["feasible"] else _distance(row), row["gpus"]


def _distance(row: Mapping[str, Any]) -> float:
    """The largest of value / limit; infinite where there is none."""
    if row.get("unserved") or not row["slo"]:
        return math.inf
    values = [(bound["value_s"], bound["limit_s"]) for bound in row["slo"].values()]
    return max(math.inf if value_s is None else value_s / limit_s for value_s, limit_s in values)


def _mark_front(rows: Sequence[dict[str, Any]]) -> None:
    """Mark the plans that no other one beats in cost, in distance from the SLO and in quality together."""
    feasible = [row for row in rows if row["feasible"]]
    for row in feasible:
        row["pareto"] = not any(_beats(other, row) for other in feasible if other is not row)


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a plan is as good in everything and better in something; qualities not measured compare with nothing."""
    losses = loss_nats(one["quality"]), loss_nats(other["quality"])
    if one["policy"] == other["policy"] or losses[0] == 0.0:
        better, worse = False, False
    elif None in losses:
        return False
    else:
        better, worse = losses[0] < losses[1], losses[0] > losses[1]  # type: ignore[operator]
    figures = [(row["usd_per_hour"], _distance(row)) for row in (one, other)]
    worse = worse or any(mine > theirs for mine, theirs in zip(*figures, strict=True))
    better = better or any(mine < theirs for mine, theirs in zip(*figures, strict=True))
    return better and not worse


def _misfit(one: Misfit) -> dict[str, Any]:
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
        "reason": one.reason,
    }


def _sentence(question: "Question", document: Mapping[str, Any]) -> str:
    slo = ", ".join(f"{one.name} {format_s(one.limit_s)}" for one in question.objectives)
    answer, nearest = document["answer"], document.get("nearest")
    if answer is None:
        if nearest is None:
            return f"No candidate serves the trace at all; the table says why. SLO: {slo}."
        far = ", ".join(
            f"{name} {'none' if one['value_s'] is None else format_s(one['value_s'])}"
            for name, one in nearest["slo"].items()
        )
        return f"No candidate holds {slo}; nearest is {_fleet(nearest)} with {far}."
    cost = answer["cost_per_million_tokens"]
    room = answer["headroom"]
    least = "" if answer["load"]["breaks_at"] else "at least "
    more = "" if room is None else f", with room for {least}{room:.0%} more load"
    return f"{_fleet(answer)} holds {slo} for ${cost:,.2f} a million output tokens{more}."


def _fleet(row: Mapping[str, Any]) -> str:
    split = f"tp {row['tp']}" + (f" x pp {row['pp']}" if row["pp"] > 1 else "")
    split += f", {row['prefill_gpus']} of them for prompts" if row["prefill_gpus"] else ""
    options = f", {' '.join(row['options'])}" if row["options"] else ""
    return f"{row['gpus']} x {row['gpu']} ({split}) under {row['policy']}{options}"
