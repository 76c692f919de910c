"""Charts of a plan over load: each fleet's latencies by the load of a GPU, and by what is offered; goodput."""

from collections.abc import Iterator, Sequence

from kvsim.report import plan_tables
from kvsim.report.page import Chart, Page
from kvsim.report.plan_tables import Fleet, Row
from kvsim.report.points import Axis, Points, scatter, seconds
from kvsim.text.units import format_s

_OFFERED = Axis("offered requests/s")


def latency_charts(page: Page, fleets: Sequence[Fleet], load: Row) -> Iterator[Chart]:
    """For each objective its value over the load of a GPU: each fleet, and that of one replica fewer."""
    rates = [row["offered_rps"] / row["rate_scale"] for row in load["curve"] if row["offered_rps"] is not None]
    if not rates:
        return
    names = list(dict.fromkeys(name for fleet in fleets for name in fleet.row["slo"]))
    for name in names:
        limit_s = next(fleet.row["slo"][name]["limit_s"] for fleet in fleets if name in fleet.row["slo"])
        sets = []
        for fleet in fleets:
            sizes = [one for one in (fleet.row, fleet.row["fewer"]) if one is not None and name in one["slo"]]
            known = [(one, one["slo"][name]["value_s"]) for one in sizes if one["slo"][name]["value_s"] is not None]
            notes = [f"{plan_tables.gpus_of(one)}: {name} {format_s(value_s)}" for one, value_s in known]
            x, y = [rates[0] / one["gpus"] for one, _ in known], [value_s for _, value_s in known]
            sets.append(Points(fleet.label, fleet.style, x, y, notes, [value_s <= limit_s for value_s in y]))
        times = seconds(name, [limit_s, *(value_s for one in sets for value_s in one.y)])
        caption = "Each plan, joined to the fleet of one replica fewer where that was simulated: fewer GPUs, more load "
        caption += "on each. Filled marks keep this limit, rings do not."
        words = f"SLO {format_s(limit_s)}"
        figure = scatter(sets, Axis("requests/s offered to a GPU"), times, joined=True, limit=(limit_s, words))
        yield page.chart(f"{name} by load", caption, figure)


def load_charts(page: Page, fleets: Sequence[Fleet], names: Sequence[str]) -> Iterator[Chart]:
    """For each objective its value by offered load: a line for each fleet that was played at several loads."""
    drawn = at_several_loads(fleets)
    for name in names:
        limit_s, sets = None, []
        for fleet in drawn:
            limit_s = fleet.row["slo"][name]["limit_s"]
            known = [one for one in fleet.row["curve"] if one["slo"][name] is not None]
            x, y = [one["offered_rps"] for one in known], [one["slo"][name] for one in known]
            notes = [f"{_at(fleet, one)}: {name} {format_s(one['slo'][name])}" for one in known]
            sets.append(Points(fleet.label, fleet.style, x, y, notes, [value_s <= limit_s for value_s in y]))
        if limit_s is None:
            return
        times = seconds(name, [limit_s, *(value_s for one in sets for value_s in one.y)])
        figure = scatter(sets, _OFFERED, times, joined=True, limit=(limit_s, f"SLO {format_s(limit_s)}"))
        caption = f"{_sizes(drawn)} Filled marks keep this limit, rings do not."
        yield page.chart(f"{name} by offered load", caption, figure)


def goodput_chart(page: Page, fleets: Sequence[Fleet]) -> Chart | None:
    """Goodput by offered load of each fleet that was played at several loads; None where none was."""
    sets = []
    drawn = at_several_loads(fleets)
    for fleet in drawn:
        rows = fleet.row["curve"]
        notes = [f"{_at(fleet, row)}: {row['binding']} nearest its limit" for row in rows]
        x, y = [row["offered_rps"] for row in rows], [row["goodput_rps"] for row in rows]
        sets.append(Points(fleet.label, fleet.style, x, y, notes, [row["holds"] for row in rows]))
    if not sets:
        return None
    caption = f"{_sizes(drawn)} Filled marks hold the SLO, rings break it. Goodput is of the whole run, with the time "
    caption += "that the last requests take."
    figure = scatter(sets, _OFFERED, Axis("goodput, requests/s"), joined=True)
    return page.chart("Goodput by offered load", caption, figure)


def at_several_loads(fleets: Sequence[Fleet]) -> list[Fleet]:
    """Those played at two loads or more whose rates are known."""
    return [one for one in fleets if len(one.row["curve"]) > 1 and one.row["curve"][0]["offered_rps"] is not None]


def _at(fleet: Fleet, row: Row) -> str:
    return f"{plan_tables.gpus_of(fleet.row)}, {row['rate_scale']:.2f} x the load"


def _sizes(fleets: Sequence[Fleet]) -> str:
    """Which fleets are drawn, and how large each is."""
    sizes = "; ".join(f"{' '.join([one.row['policy'], *one.row['options']])}: {one.row['gpus']}" for one in fleets)
    return f"The best fleet of each policy and cache on {fleets[0].row['gpu']}, at its own size in GPUs ({sizes})."
