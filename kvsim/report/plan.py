"""The page of a plan, for who decides: the answer first, then why, then what it rests on and how to run it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvsim.report import plan_tables, tables
from kvsim.report.page import Chart, Contents, Page, html_of
from kvsim.report.plan_curves import at_several_loads, goodput_chart, latency_charts, load_charts
from kvsim.report.plan_tables import Fleet, Row, label_of, usd
from kvsim.report.plots import style
from kvsim.report.points import Axis, Points, scatter
from kvsim.report.run_charts import cdf_chart, coloured, places_chart, spent_charts
from kvsim.report.runs import runs_of
from kvsim.results.causes import CAUSES
from kvsim.results.summary import Result
from kvsim.text.units import format_s
from kvsim.version import __version__

_COST = Axis("$ a million output tokens")


def plan_page(document: Row, command: str) -> str:
    """A self-contained page about the document of `kvsim plan`, without a run of its plan."""
    return html_of(plan_contents(document, command))


def plan_contents(
    document: Row,
    command: str,
    played: Result | None = None,
    *,
    slo: Mapping[str, float] | None = None,
    warmup_s: float = 0.0,
) -> Contents:
    """What a page says about the document of `kvsim plan`, which `command` asked for.

    `played` is a run of its plan, or of the nearest one, with the statistics of `summarize`; without it the page does
    not say what memories hold and what latency is spent on.
    """
    fleets = fleets_of(document)
    chosen = document["answer"] or document.get("nearest")
    page = Page()
    content: dict[str, Any] = {
        "sentence": document["sentence"],
        "holds": document["answer"] is not None,
        "partial": document["partial"],
        "fleets": [(fleet.label, fleet.style.css_border) for fleet in fleets],
        "decision": None,
        "objectives": None,
        "by_load": [],
        "goodput": [],
        "loaded": [],
        "by_offered": [],
        "curve": None,
        "kinds": None,
    }
    if chosen is not None:
        load = chosen["load"]
        content |= {
            "decision": plan_tables.decision(chosen, load),
            "objectives": plan_tables.objectives(chosen),
            "by_load": list(latency_charts(page, fleets, load)),
            "goodput": [goodput] if (goodput := goodput_chart(page, fleets)) else [],
            "loaded": [(fleet.label, fleet.style.css_border) for fleet in at_several_loads(fleets)],
            "by_offered": list(load_charts(page, fleets, list(chosen["slo"]))),
            "curve": plan_tables.curve(load),
            "kinds": plan_tables.kinds(chosen),
        }
    content |= {
        "costs": [chart for draw in (cost_chart, quality_chart) if (chart := draw(page, fleets)) is not None],
        "plans": plan_tables.plans(fleets, document["slo_asked"]) if fleets else None,
        "sensitivity": plan_tables.sensitivity(document),
        "configurations": plan_tables.configurations(document),
        "refused": plan_tables.refused(row for row in document["plans"] if row["gpus"] is None),
        "qualities": plan_tables.qualities(fleets) if fleets else None,
        "sources": plan_tables.sources(document),
        **_of_run(page, played, slo, warmup_s),
        "commands": list(_commands(document, chosen, command)),
        "notes": _notes(document, chosen, played),
    }
    trace = next(row["of"] for row in document["sources"] if row["figure"] == "requests")
    title = f"What to buy for {trace}"
    return page.contents("plan", title, {"version": __version__}, main=content["plans"], **content)


def fleets_of(document: Row) -> list[Fleet]:
    """The document's plans, but for what cannot serve."""
    rows = [row for row in document["plans"] if row["gpus"] is not None]
    return [Fleet(label_of(row), style(index), row) for index, row in enumerate(rows)]


def cost_chart(page: Page, fleets: Sequence[Fleet]) -> Chart | None:
    """Cost against the objective that is tightest; None where no fleet has both."""
    shares = [(fleet, _share_of_limit(fleet.row)) for fleet in _with_cost(fleets)]
    sets = [_priced(fleet, share, f"{share:.0%} of the nearest limit") for fleet, share in shares if share is not None]
    if not sets:
        return None
    caption = "The objective nearest its limit, or furthest above it. Lower and further left is better; filled marks "
    caption += "are on the front of cost, distance and quality."
    figure = scatter(sets, _COST, Axis("% of the limit", 0.01), joined=False, limit=(1.0, "SLO"))
    return page.chart("Cost and latency", caption, figure)


def quality_chart(page: Page, fleets: Sequence[Fleet]) -> Chart | None:
    """Cost against quality where it was measured; None where no fleet is known to lose any."""
    known = [fleet for fleet in _with_cost(fleets) if not isinstance(fleet.row["quality"], str)]
    if not any(fleet.row["quality"]["kl_nats"] for fleet in known):
        return None
    sets = [
        _priced(fleet, fleet.row["quality"]["kl_nats"], plan_tables.quality_of(fleet.row["quality"])) for fleet in known
    ]
    caption = (
        "Divergence from full attention; plans whose quality nobody measured are left out. Lower and further left "
    )
    caption += "is better; filled marks are on the front."
    return page.chart("Cost and quality", caption, scatter(sets, _COST, Axis("KL (nats a token)"), joined=False))


def _with_cost(fleets: Sequence[Fleet]) -> list[Fleet]:
    return [fleet for fleet in fleets if fleet.row["cost_per_million_tokens"] is not None]


def _priced(fleet: Fleet, y: float, note: str) -> Points:
    cost = fleet.row["cost_per_million_tokens"]
    words = f"{plan_tables.gpus_of(fleet.row)}, {usd(cost)}: {note}"
    return Points(fleet.label, fleet.style, [cost], [y], [words], [fleet.row["pareto"]])


def _share_of_limit(row: Row) -> float | None:
    values = [(bound["value_s"], bound["limit_s"]) for bound in row["slo"].values()]
    if not values or any(value_s is None for value_s, _ in values):
        return None
    return max(float(value_s / limit_s) for value_s, limit_s in values)


def _of_run(page: Page, played: Result | None, slo: Mapping[str, float] | None, warmup_s: float) -> dict[str, Any]:
    """What the plan's own run says of latency, memory and tenants."""
    if played is None:
        return {"played": False}
    runs = runs_of([played], slo, warmup_s)
    return {
        "played": True,
        "latency": [cdf_chart(page, runs, name, warmup_s) for name in ("ttft_s", "tpot_s")],
        "causes": coloured(CAUSES),
        "spent_shares": spent_charts(page, runs),
        "spent": tables.spent(runs),
        **places_chart(page, runs),
        "places": tables.places(runs),
        "cache": tables.cache(runs),
        "tenants": tables.tenants(runs) if len(runs[0].summary["tenants"]) > 1 else None,
        "fairness": tables.fairness(runs),
    }


def _commands(document: Row, chosen: Row | None, command: str) -> Iterator[tuple[str, str, Sequence[str]]]:
    """What to run: its title, the command, and what to know of it; no command where an engine has none."""
    yield "This plan again", command, ["plan.json, beside this page, has all of its figures"]
    if chosen is not None:
        whose = "The plan's fleet" if document["answer"] else "The nearest fleet"
        yield f"{whose} in the simulator, with the same figures", chosen["simulate"], []
        for name, engine in chosen.get("engines", {}).items():
            for server in engine["commands"]:
                title = f"{name}, each of {server['servers']} servers for {server['for']}"
                yield title, server["command"], [*engine["notes"], "this project has not run it"]
            if engine["why_not"]:
                yield name, "", [engine["why_not"]]
        beside = chosen.get("beside")
        if beside is not None:
            words = f"{plan_tables.gpus_of(beside)}, {plan_tables.split_of(beside)}, "
            words += f"{usd(beside['cost_per_million_tokens'])} a million output tokens: {label_of(beside)}"
            yield "The cheapest plan that an engine runs today", beside["simulate"], [words]


def _notes(document: Row, chosen: Row | None, played: Result | None) -> list[str]:
    notes = [
        "Percentiles are nearest ranks over finished requests; a fleet that lets a request go unserved holds nothing.",
        "Costs are the fleet's price for the time of the trace, shared by the output tokens of its finished requests.",
        "Energy takes every board for drawing its maximum all the time, without hosts and cooling.",
    ]
    if chosen is not None and chosen.get("seeds", 1) > 1:
        notes.append(f"Values are means over traces of {chosen['seeds']} seeds.")
    if played is not None:
        notes.append("Latency, memory and tenants are of one run of the plan's fleet, on the trace of the first seed.")
    first = document["first_answer"]
    if first is not None:
        fleet = f"{first['gpus']} x {first['gpu']}" if first["holds"] else "that no fleet holds it"
        notes.append(f"The first estimate, by closed forms, was {fleet}, after {format_s(first['wall_s'])}.")
    words = f"{document['simulations']} simulations of {format_s(document['simulations_cpu_s'])} of CPU together, in "
    notes.append(words + f"{format_s(document['wall_s'])}, by kvsim {__version__}.")
    return notes
