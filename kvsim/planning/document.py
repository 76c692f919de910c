"""The document of a plan: the answer, every line's best fleet, why others fail, and where each figure comes from."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsim.planning import launch
from kvsim.planning.candidates import Candidates, Family
from kvsim.planning.configurations import configurations_of
from kvsim.planning.curves import load_of
from kvsim.planning.findings import Estimate, Findings
from kvsim.planning.front import mark_front, order
from kvsim.planning.rows import misfit_row, row_of
from kvsim.planning.sources import sources_of
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
    question: "Question", findings: Findings, could: Candidates, traces: Sequence[Trace], context_tokens: int
) -> dict[str, Any]:
    """The document, but for what the clock says."""
    rows = {i: row_of(question, findings, i, traces, context_tokens) for i in findings.best_of_lines()}
    mark_front(list(rows.values()))
    answer, nearest = findings.found.answer, None
    if answer is None:
        nearest = findings.nearest()
    chosen = rows.get(answer) if answer is not None else None
    ordered = sorted(rows.values(), key=lambda row: (row is not chosen, *order(row)))  # of equal ones the answer first
    document: dict[str, Any] = {"sentence": "", "answer": None}
    if chosen is not None and answer is not None:
        load = load_of(question, findings, answer, traces)
        document["answer"] = {
            **{name: chosen[name] for name in HEADLINE},
            "headroom": load["headroom"],
            "bottleneck": load["bottleneck"],
            "load": load,
            **{name: value for name, value in chosen.items() if name not in (*HEADLINE, "curve")},
            "engines": _engines(question, findings, answer, traces),
            "beside": None if launch.run_by_engines(findings.families[answer]) else _engine_plan(rows, findings),
        }
    if nearest is not None:
        load = load_of(question, findings, nearest, traces)
        document["nearest"] = {**row_of(question, findings, nearest, traces, context_tokens), "load": load}
    elif answer is None:
        document["nearest"] = None
    document["slo_asked"] = {one.name: one.limit_s for one in question.objectives}
    document["plans"] = [*ordered, *(misfit_row(one) for one in could.misfits)]
    document["configurations"] = configurations_of(findings)
    if question.calibration is not None:
        document["calibration"] = dict(question.calibration)
    document["sources"] = sources_of(question, could, traces[0])
    document["sentence"] = _sentence(question, document)
    return document


def _engines(question: "Question", findings: Findings, index: int, traces: Sequence[Trace]) -> dict[str, Any]:
    longest = max(int((trace.prompt_tokens + trace.output_tokens).max()) for trace in traces)
    family, best = findings.families[index], findings.best(index)
    return launch.engines(family, family.fleet(best.replicas, best.prompts), question.asked.model, longest)


def _engine_plan(rows: Mapping[int, dict[str, Any]], findings: Findings) -> dict[str, Any] | None:
    """The cheapest plan that an engine runs today."""
    own = [row for i, row in rows.items() if row["feasible"] and launch.run_by_engines(findings.families[i])]
    return min(own, key=order, default=None)


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
