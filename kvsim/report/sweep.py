"""The page of a sweep: its best points, figures over a dimension, every point, and what was asked."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from kvsim.report.dimensions import Groups, amounts, axis_of, first_of_amounts, grouped, words_of
from kvsim.report.page import (
    MISSING,
    Cell,
    Chart,
    Contents,
    Page,
    Table,
    html_of,
    name_cell,
    number_cell,
    table,
    text_cell,
)
from kvsim.report.points import Axis, Points, placed, scatter, seconds
from kvsim.report.runs import format_rate
from kvsim.results.row import Value
from kvsim.text.units import format_s
from kvsim.version import __version__

Row = Mapping[str, Value]
_ROWS_SHOWN = 1_000
_VALUES_SHOWN = 20
_MARKS = 4_000  # of a chart


class Figure(NamedTuple):
    """A figure of a point: what people call it, how they read it, and which end of it is better."""

    name: str
    show: Callable[[float], str]
    best: Callable[[Sequence[float]], float]
    drawn: bool


FIGURES = {
    "output_tokens_per_s": Figure("tokens/s", format_rate, max, True),
    "ttft_s.p50": Figure("TTFT p50", format_s, min, False),
    "ttft_s.p99": Figure("TTFT p99", format_s, min, True),
    "tpot_s.p50": Figure("TPOT p50", format_s, min, False),
    "tpot_s.p99": Figure("TPOT p99", format_s, min, True),
    "goodput_rps": Figure("goodput/s", format_rate, max, True),
}


def sweep_page(document: Mapping[str, Any], rows: Sequence[Row], command: str) -> str:
    """A self-contained page about a sweep, as `sweep_contents`."""
    return html_of(sweep_contents(document, rows, command))


def sweep_contents(document: Mapping[str, Any], rows: Sequence[Row], command: str) -> Contents:
    """What a page says about a sweep that `command` asked for: the same for the same points.

    `rows` are those of its table, `document` is `sweep.json`.
    """
    dims = list(document["over"])
    done = [row for row in rows if row["status"] == "done"]
    page = Page()
    groups, along, charts = Groups([], joined=False), dims[0], []
    if done:
        drawn = done[:: -(-len(done) // _MARKS)]
        along = first_of_amounts(drawn, dims)
        groups = grouped(drawn, along, dims)
        few = "each point" if len(drawn) == len(done) else f"{len(drawn):,} of {len(done):,} points, evenly taken"
        charts = _charts(page, drawn, along, groups, dims, few)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("done", "impossible", "killed")}
    content = {
        "facts": {"Points": f"{len(rows):,}", **{name.title(): f"{n:,}" for name, n in counts.items() if n}},
        "finding": _finding(done, dims),
        "best": _best(done, dims),
        "along": along,
        "groups": [(group.label, group.style.css_border) for group in groups.groups],
        "charts_drawn": charts,
        "points": _points(rows, dims),
        "over": _over(document),
        "options": _options(document["options"]),
        "command": command,
        "version": __version__,
    }
    title = f"Sweep over {', '.join(dims)}"
    every = _points(rows, dims, len(rows))
    return page.contents("sweep", title, {"version": __version__}, main=every, **content)


def _finding(done: Sequence[Row], dims: Sequence[str]) -> str:
    key, figure = "output_tokens_per_s", FIGURES["output_tokens_per_s"]
    known = _known(done, key)
    if not known:
        return "No point has figures."
    value = figure.best(list(known.values()))
    first = next(row for index, row in enumerate(done) if known.get(index) == value)
    return f"Most output tokens/s: {figure.show(value)}, at {words_of(first, dims)}."


def _known(rows: Sequence[Row], key: str) -> dict[int, float]:
    """A figure by the number of its row, where it is known."""
    return {i: float(value) for i, row in enumerate(rows) if isinstance(value := row.get(key), int | float)}


def _best(done: Sequence[Row], dims: Sequence[str]) -> Table | None:
    """For each figure the point where it is best; the first of them, with how many others share it."""
    found = []
    for key, figure in FIGURES.items():
        known = _known(done, key)
        if not known:
            continue
        value = figure.best(list(known.values()))
        own = [done[i] for i, each in known.items() if each == value]
        also = f"and {len(own) - 1:,} more" if len(own) > 1 else ""
        cells = [number_cell(value, figure.show), _plain(own[0]["point"]), *(_plain(own[0][name]) for name in dims)]
        found.append([name_cell(figure.name), *cells, text_cell(also)])
    caption = "The point where each figure is best."
    texts = [name for name in dims if any(isinstance(row[name], str) for row in done)]
    headings = ["figure", "best", "point", *dims, "shared by"]
    return table(caption, headings, found, [*texts, "shared by"]) if found else None


def _charts(page: Page, done: Sequence[Row], along: str, groups: Groups, dims: Sequence[str], few: str) -> list[Chart]:
    """Each figure over the dimension `along`."""
    places = amounts(along, [row[along] for row in done])
    categories: list[str] = []
    if places is None:
        categories = list(dict.fromkeys(str(row[along]) for row in done))
        places = [placed(categories)(str(row[along])) for row in done]
    x = Axis(along) if categories else axis_of(along, places)
    charts = []
    for key, figure in FIGURES.items():
        known = _known(done, key)
        if not known or not figure.drawn:
            continue
        sets = []
        for group in groups.groups:
            rows = sorted((i for i in group.rows if i in known), key=places.__getitem__)
            notes = [f"{figure.show(known[i])}: point {done[i]['point']}, {words_of(done[i], dims)}" for i in rows]
            xs, ys = [places[i] for i in rows], [known[i] for i in rows]
            sets.append(Points(group.label, group.style, xs, ys, notes, [True] * len(rows)))
        y = seconds(figure.name, list(known.values())) if "_s." in key else Axis(figure.name)
        better = "Higher" if figure.best is max else "Lower"
        drawn = scatter(sets, x, y, joined=groups.joined, categories=categories)
        charts.append(page.chart(f"{figure.name} over {along}", f"A mark for {few}. {better} is better.", drawn))
    return charts


def _points(rows: Sequence[Row], dims: Sequence[str], most: int = _ROWS_SHOWN) -> Table:
    """Every point, or the first of very many."""
    figures = {key: figure for key, figure in FIGURES.items() if _known(rows, key)}
    found = [
        [
            name_cell(str(row["point"])),
            *(_plain(row[name]) for name in dims),
            *(number_cell(_figure(row, key), figure.show) for key, figure in figures.items()),
            text_cell(str(row.get("bottleneck") or MISSING)),
            text_cell(str(row["status"]) if row["reason"] is None else f"{row['status']}: {row['reason']}"),
        ]
        for row in rows[:most]
    ]
    few = len(rows) <= most
    caption = "Every point." if few else f"The first {most:,} points of {len(rows):,}; sweep.parquet has all."
    texts = [name for name in dims if any(isinstance(row[name], str) for row in rows)]
    headings = ["point", *dims, *(figure.name for figure in figures.values()), "bottleneck", "status"]
    return table(caption, headings, found, [*texts, "bottleneck", "status"])._replace(tall=True)


def _figure(row: Row, key: str) -> float | None:
    value = row.get(key)
    return value if isinstance(value, int | float) else None


def _plain(value: Value) -> Cell:
    """A value of a dimension: text, or a number as it is."""
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return text_cell(str(value))
    return number_cell(value, lambda own: f"{own:,}" if isinstance(own, int) else f"{own:.6g}")


def _over(document: Mapping[str, Any]) -> Table:
    """The dimensions, and the values that each has or is drawn from."""
    rows = []
    for key, values in document["over"].items():
        if isinstance(values, Mapping):
            words = f"drawn from {values['low']:g} to {values['high']:g}" + (", by factors" if values["log"] else "")
        else:
            shown = [", ".join(map(str, of)) if isinstance(of, list) else str(of) for of in values[:_VALUES_SHOWN]]
            words = "; ".join(shown) + (
                f"; and {len(values) - _VALUES_SHOWN:,} more" if len(values) > len(shown) else ""
            )
        rows.append([name_cell(key), text_cell(words)])
    drawn = document["draw"]
    caption = "The dimensions" + ("; every combination is a point." if drawn is None else f", {drawn:,} points drawn.")
    return table(caption, ["dimension", "values"], rows, ["values"])


def _options(options: Mapping[str, Any]) -> Table:
    rows = [
        [name_cell(key), text_cell(value if isinstance(value, str) else json.dumps(value, default=str))]
        for key, value in options.items()
    ]
    return table("What all points share, as given.", ["option", "value"], rows, ["value"])
