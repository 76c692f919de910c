"""`plan` for notebooks: its answer as a table, and the charts of the page about it."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

from kvsim.notebook.figures import shown
from kvsim.planning import plan as planning
from kvsim.report import plan as report
from kvsim.report import plan_tables
from kvsim.report.page import Page, fragment

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Asked = ParamSpec("Asked")


class Plan(planning.Plan):
    """What came of a plan, which a notebook shows as a table; its charts are those of `kvsim plan --out`."""

    def plot_latency(self, objective: str | None = None) -> "Figure":
        """An objective, by default the first, by the load of a GPU: every plan, and its fleet of one replica fewer.

        Raises ValueError for an objective that the plan has not, and where no load was tried.
        """
        document = self.to_dict()
        names = list(document["slo_asked"])
        name = names[0] if objective is None else objective
        if name not in names:
            raise ValueError(f"objective {name!r} is none of this plan; it has {', '.join(names)}")
        page, chosen = Page(), self.answer or self.nearest
        drawn = [] if chosen is None else report.latency_charts(page, report.fleets_of(document), chosen["load"])
        return shown(page, next((chart for chart in drawn if chart.title.startswith(f"{name} by")), None))

    def plot_goodput(self) -> "Figure":
        """Goodput of the answer's fleet, or of the nearest one's, by offered load."""
        page, chosen = Page(), self.answer or self.nearest
        fleets = report.fleets_of(self.to_dict())
        return shown(page, None if chosen is None else report.goodput_chart(page, chosen, fleets))

    def plot_cost(self) -> "Figure":
        """Cost against the tightest objective: a mark for each plan, filled on the front."""
        page = Page()
        return shown(page, report.cost_chart(page, report.fleets_of(self.to_dict())))

    def plot_quality(self) -> "Figure":
        """Cost against quality, of plans whose quality was measured."""
        page = Page()
        return shown(page, report.quality_chart(page, report.fleets_of(self.to_dict())))

    def _repr_html_(self) -> str:
        document = self.to_dict()
        chosen, fleets = self.answer or self.nearest, report.fleets_of(document)
        tables = [] if chosen is None else [plan_tables.decision(chosen, chosen["load"])]
        return fragment(self.sentence, [*tables, plan_tables.plans(fleets, document["slo_asked"])])


def _for_notebooks(asked: Callable[Asked, planning.Plan]) -> Callable[Asked, Plan]:
    @wraps(asked)
    def answered(*args: Asked.args, **options: Asked.kwargs) -> Plan:
        return Plan(asked(*args, **options).to_dict())

    return answered


plan = _for_notebooks(planning.plan)
