"""Charts of single points, joined where they follow each other: fleets, loads, the points of a sweep."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from kvsim.report.plots import Figure, Style, base_layout, limit_at, numbers, shortened

_MARK = 9  # pixels
_FAR = 20  # times the limit: beyond, the axis is logarithmic, or its line would lie on the ground


class Points(NamedTuple):
    """What one label has: where its points are, what is said at each, and which are filled rather than rings."""

    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    notes: Sequence[str]
    filled: Sequence[bool]


class Axis(NamedTuple):
    """An axis: its title and, for figures, the unit that they are divided by."""

    title: str
    unit: float = 1.0


def seconds(title: str, values_s: Sequence[float]) -> Axis:
    """The axis of a time, in milliseconds where all are below a second."""
    return Axis(f"{title} (ms)", 1e-3) if max(values_s, default=0.0) < 1 else Axis(f"{title} (s)")


def scatter(
    sets: Sequence[Points],
    x: Axis,
    y: Axis,
    *,
    joined: bool,
    limit: tuple[float, str] | None = None,
    categories: Sequence[str] = (),
) -> Figure:
    """Points over figures, or over `categories` in their order; `limit` is a height and the words beside its line."""
    figure = {
        "data": [_marks(one, x, y, joined=joined) for one in sets],
        "layout": base_layout(escape(x.title, quote=False), escape(y.title, quote=False)),
    }
    layout: dict[str, Any] = figure["layout"]  # type: ignore[assignment]
    heights = [value / y.unit for one in sets for value in one.y] + ([limit[0] / y.unit] if limit else [])
    lowest, highest = min(heights, default=0.0), max(heights, default=0.0) or 1.0
    log = limit is not None and lowest > 0 and highest > _FAR * limit[0] / y.unit
    if log:
        layout["yaxis"] |= {"type": "log", "range": [math.log10(lowest / 1.5), math.log10(highest * 1.5)]}
        layout["yaxis"]["title"]["text"] += ", log scale"
    else:
        layout["yaxis"] |= {"range": [-0.04 * highest, 1.12 * highest]}
    if categories:
        names = [escape(shortened(name), quote=False) for name in categories]
        places = list(range(len(names)))
        layout["xaxis"] |= {"tickvals": places, "ticktext": names, "range": [-0.5, len(names) - 0.5]}
    if limit is not None:
        layout |= limit_at(limit[0] / y.unit, limit[1])
        if log:  # where Plotly takes the places of texts, not of lines, for logarithms
            layout["annotations"][0]["y"] = math.log10(limit[0] / y.unit)
    return figure


def placed(categories: Sequence[str]) -> Callable[[str], float]:
    """Where a category stands on an axis of `categories`."""
    places = {name: float(index) for index, name in enumerate(categories)}
    return places.__getitem__


def _marks(one: Points, x: Axis, y: Axis, *, joined: bool) -> dict[str, Any]:
    symbols = ["circle" if filled else "circle-open" for filled in one.filled]
    return {
        "type": "scatter",
        "mode": "lines+markers" if joined and len(one.y) > 1 else "markers",
        "name": escape(shortened(one.label), quote=False),
        "x": numbers(np.asarray(one.x, np.float64) / x.unit),
        "y": numbers(np.asarray(one.y, np.float64) / y.unit),
        "line": {"color": one.style.colour, "dash": one.style.dash, "width": 2},
        "marker": {
            "color": one.style.colour,
            "symbol": symbols,
            "size": _MARK,
            "line": {"width": 2, "color": one.style.colour},
        },
        "customdata": [escape(note, quote=False) for note in one.notes],
        "hovertemplate": "%{customdata}<extra>%{fullData.name}</extra>",
    }
