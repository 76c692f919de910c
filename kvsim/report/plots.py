"""The charts of the report page, as Plotly figures in plain dicts.

The page titles and captions them and sets the colours of text and grid, which depend on the reader's theme. Text from
traces and policies is escaped here, because Plotly reads tags in labels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from kvsim.results.curves import total
from kvsim.results.summary import Array, Floats
from kvsim.text.units import format_bytes, format_s

Figure: TypeAlias = dict[str, Any]

# Okabe and Ito's palette for the colour-blind, without black, light colours darker, and more: 3:1 on light and dark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c5659a", "#b8860b", "#8a63d2", "#2f97d4", "#7f8790", "#a0522d", "#6b8e23")
_DASHES = {"solid": "solid", "dash": "dashed", "dot": "dotted"}  # Plotly's name and that of CSS

_CDF_POINTS = 400
_LINE_POINTS = 2_000  # of one line, and all lines together are thinned to
_ALL_POINTS = 40_000
_LABEL_CHARACTERS = 30
_NEAR_CAPACITY = 0.3  # a memory used less than this is drawn without its capacity, which would flatten the lines


class Style(NamedTuple):
    """How one run looks in every chart and legend."""

    colour: str
    dash: str

    @property
    def css_border(self) -> str:
        """The same line as a CSS border style."""
        return f"{_DASHES[self.dash]} {self.colour}"


def style(index: int) -> Style:
    """The style of run `index`: colours first, then the same colours in other dashes."""
    dashes = tuple(_DASHES)
    return Style(COLOURS[index % len(COLOURS)], dashes[index // len(COLOURS) % len(dashes)])


def cdf(samples: Mapping[str, Floats], quantity: str) -> Figure:
    """Share of requests within a time, over a logarithmic axis: one line per label, its values in seconds."""
    lines = []
    for index, (label, values) in enumerate(samples.items()):
        if not len(values):
            continue
        ordered = np.sort(values)
        # The i-th smallest of n is reached by i/n of the requests; the line rises from 0 at the first.
        kept = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), _CDF_POINTS)).round().astype(np.int64))
        x, y = np.r_[ordered[0], ordered[kept]], np.r_[0, (kept + 1) / len(ordered)]
        hover = "%{y:.1%} of requests within %{x:.3~s}s"
        lines.append(line_of(label, style(index), x, y, hover) | {"line": _stroke(style(index), "hv")})
    layout = base_layout(f"{quantity} (log scale)", "share of requests")
    ticks_s = _log_ticks(np.concatenate([np.empty(0), *samples.values()]))
    layout["xaxis"] |= {"type": "log", "tickvals": ticks_s, "ticktext": [format_s(tick_s) for tick_s in ticks_s]}
    layout["yaxis"] |= {"range": [0, 1.02], "tickformat": ".0%"}
    return {"data": lines, "layout": layout}


def occupancy(curves: Mapping[str, tuple[Floats, Floats]], capacity_bytes: float) -> Figure:
    """Bytes in a memory over time: one line per label (times in s, bytes), and the capacity where it is near."""
    highest = max((float(values.max()) for _, values in curves.values() if len(values)), default=0.0)
    near = highest >= _NEAR_CAPACITY * capacity_bytes
    top = max(highest, capacity_bytes) if near else highest
    scale, unit = _byte_unit(top)
    most = min(_LINE_POINTS, max(2, _ALL_POINTS // max(1, len(curves))))
    lines = []
    for index, (label, curve) in enumerate(curves.items()):
        times_s, values = thin(*curve, most)
        lines.append(line_of(label, style(index), times_s, values / scale, f"%{{y:.4~g}} {unit} at %{{x:.4~g}} s"))
    layout = base_layout("time (s)", unit)
    layout["yaxis"] |= {"range": [0, 1.1 * top / scale if top else 1]}
    if near and capacity_bytes:
        layout |= limit_at(capacity_bytes / scale, f"capacity {format_bytes(capacity_bytes)}")
    return {"data": lines, "layout": layout}


def stacked_bytes(bars: Mapping[str, Mapping[str, float]], parts: Sequence[str]) -> Figure:
    """Bytes as one horizontal bar per label, stacked by `parts`, which are coloured in their order."""
    scale, unit = _byte_unit(max((sum(bar.values()) for bar in bars.values()), default=0.0))
    return _stacked(bars, parts, scale, unit, format_bytes)


def stacked_shares(bars: Mapping[str, Mapping[str, float]], parts: Sequence[str]) -> Figure:
    """Shares as one horizontal bar per label, stacked by `parts`, which are coloured in their order."""
    figure = _stacked(bars, parts, 1, "", "{:.1%}".format)
    figure["layout"]["xaxis"] |= {"range": [0, 1], "tickformat": ".0%"}
    return figure


def _stacked(
    bars: Mapping[str, Mapping[str, float]], parts: Sequence[str], scale: float, unit: str, show: Callable[[float], str]
) -> Figure:
    rows = list(range(len(bars)))
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": escape(part, quote=False),
            "y": rows,
            "x": numbers(np.array([bar.get(part, 0) / scale for bar in bars.values()], np.float64)),
            "customdata": [show(bar.get(part, 0)) for bar in bars.values()],
            "hovertemplate": "%{customdata}<extra>%{fullData.name}</extra>",
            "marker": {"color": COLOURS[index % len(COLOURS)]},
        }
        for index, part in enumerate(parts)
    ]
    layout = base_layout(unit, "")
    ticks = [escape(shortened(label), quote=False) for label in bars]
    layout["yaxis"] |= {"tickvals": rows, "ticktext": ticks, "range": [len(bars) - 0.5, -0.5], "showgrid": False}
    layout |= {"barmode": "stack", "bargap": 0.35, "height": 90 + 34 * len(bars)}
    return {"data": data, "layout": layout}


def divergence(
    measured: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[tuple[float, float]]]],
) -> Figure:
    """Loss by context: one line per label, through its contexts in tokens and means in nats, with their intervals."""
    lines = []
    for index, (label, (contexts, means, intervals)) in enumerate(measured.items()):
        hover = "%{y:.4f} nats a token after %{x:,} tokens"
        line = line_of(label, style(index), np.array(contexts, np.float64), np.array(means, np.float64), hover)
        above = [high - mean for mean, (_, high) in zip(means, intervals, strict=True)]
        below = [mean - low for mean, (low, _) in zip(means, intervals, strict=True)]
        error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        lines.append(line | {"mode": "lines+markers", "error_y": error})
    layout = base_layout("tokens of context (log scale)", "KL (nats a token)")
    ticks = sorted({context for contexts, _, _ in measured.values() for context in contexts})
    layout["xaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,}" for tick in ticks]}
    layout["yaxis"] |= {"rangemode": "tozero"}
    return {"data": lines, "layout": layout}


def total_over_replicas(series: Mapping[str, Array], column: str) -> tuple[Floats, Floats]:
    """Times in s and the sum of `column` over all replicas, exact where the replicas are linear in between.

    Each time stands twice, with the value before and after a jump; a replica keeps its first and last value outside.
    """
    replicas = [series["replica"] == replica for replica in np.unique(series["replica"])]
    return total([(series["time_s"][own], series[column][own]) for own in replicas])


def thin(x: Floats, y: Floats, most: int) -> tuple[Floats, Floats]:
    """About `most` of the points: both ends, and the lowest and highest of each of `most` / 2 stretches."""
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most // 2 + 1).astype(np.int64)
    kept = {0, len(x) - 1}
    for start, stop in pairwise(edges.tolist()):
        kept |= {int(start + y[start:stop].argmin()), int(start + y[start:stop].argmax())}
    rows = np.array(sorted(kept))
    return x[rows], y[rows]


def limit_at(height: float, text: str) -> dict[str, Any]:
    """What a layout gets for a dashed line across it, with our own words at its right end."""
    mark = {"xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height, "type": "line"}
    note = {"text": text, "xref": "paper", "x": 1, "y": height}
    return {
        "shapes": [mark | {"line": {"color": "#7f8790", "dash": "dash", "width": 1.5}}],
        "annotations": [note | {"xanchor": "right", "yanchor": "bottom", "showarrow": False}],
    }


def line_of(label: str, look: Style, x: Floats, y: Floats, hover: str) -> dict[str, Any]:
    """A line; `hover` is Plotly's template for what it says at a point."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": escape(shortened(label), quote=False),
        "x": numbers(x),
        "y": numbers(y),
        "line": _stroke(look, "linear"),
        "hovertemplate": hover + "<extra>%{fullData.name}</extra>",
    }


def _stroke(look: Style, shape: str) -> dict[str, Any]:
    return {"color": look.colour, "dash": look.dash, "width": 2, "shape": shape}


def _log_ticks(values: Floats) -> list[float]:
    """Powers of ten around the values, with their doubles and fivefolds where that is not too many."""
    positive = values[values > 0]
    if not len(positive):
        return []
    decades = range(math.floor(math.log10(positive.min())), math.ceil(math.log10(positive.max())) + 1)
    return [fold * 10.0**decade for decade in decades for fold in ((1, 2, 5) if len(decades) <= 4 else (1,))]


def base_layout(x_title: str, y_title: str) -> dict[str, Any]:
    """What all charts have in common; titles are our own words."""
    axis = {"automargin": True, "zeroline": False, "gridcolor": "#88888855"}
    return {
        "xaxis": axis | {"title": {"text": x_title}, "rangemode": "tozero"},
        "yaxis": axis | {"title": {"text": y_title}},
        "showlegend": False,
        "height": 320,
        "margin": {"l": 10, "r": 12, "t": 12, "b": 10},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
    }


def _byte_unit(largest_bytes: float) -> tuple[int, str]:
    """The binary unit in which `largest_bytes` is at least 1, and its name."""
    names = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = max((power for power in range(len(names)) if largest_bytes >= 1024**power), default=0)
    return 1024**power, names[power]


def shortened(label: str) -> str:
    """A label as long as there is room for."""
    return label if len(label) <= _LABEL_CHARACTERS else label[: _LABEL_CHARACTERS - 1] + "…"


def numbers(values: Floats) -> list[float]:
    """Six digits each: finer than a screen, and half the size of the page."""
    return [float(f"{value:.6g}") for value in values.tolist()]
