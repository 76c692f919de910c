"""Charts of our pages as Plotly's own figures."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvsim.report.page import Chart, Page

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def shown(page: Page, chart: Chart | None) -> "Figure":
    """A chart with its title and a legend. Raises ValueError where there was nothing to draw."""
    if chart is None:
        raise ValueError("there is nothing to draw: no plan has these figures")
    from plotly.graph_objects import Figure

    figure = Figure(page.figure(chart))
    figure.update_layout(title=chart.title, showlegend=True, margin={"t": 48}, height=420)
    return figure


def pandas() -> Any:
    """The module; ModuleNotFoundError where it is not installed, which this package does not ask for."""
    return import_module("pandas")
