"""`plan` for notebooks: its answer as a table, and the charts of the page about it."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec

from kvsim.notebook.figures import shown
from kvsim.planning import plan as planning
from kvsim.report import plan as report
from kvsim.report import plan_curves, plan_tables
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
        name, page, chosen = self._objective(objective), Page(), self.answer or self.nearest
        fleets = report.fleets_of(self.to_dict())
        drawn = [] if chosen is None else plan_curves.latency_charts(page, fleets, chosen["load"])
        return shown(page, next((chart for chart in drawn if chart.title.startswith(f"{name} by")), None))

    def plot_goodput(self) -> "Figure":
        """Goodput by offered load: a line for the best fleet of each policy and cache on the answer's GPU."""
        page = Page()
        return shown(page, plan_curves.goodput_chart(page, report.fleets_of(self.to_dict())))

    def plot_load(self, objective: str | None = None) -> "Figure":
        """An objective, by default the first, by offered load: a line for each fleet that `plot_goodput` draws.

        Raises ValueError for an objective that the plan has not, and where no load was tried.
        """
        page, name = Page(), self._objective(objective)
        drawn = plan_curves.load_charts(page, report.fleets_of(self.to_dict()), [name])
        return shown(page, next(drawn, None))

    def plot_cost(self) -> "Figure":
        """Cost against the tightest objective: a mark for each plan, filled on the front."""
        page = Page()
        return shown(page, report.cost_chart(page, report.fleets_of(self.to_dict())))

    def plot_quality(self) -> "Figure":
        """Cost against quality, of plans whose quality was measured."""
        page = Page()
        return shown(page, report.quality_chart(page, report.fleets_of(self.to_dict())))

    def _objective(self, asked: str | None) -> str:
        """The name of an objective of this plan, by default the first; ValueError for any other."""
        names = list(self.to_dict()["slo_asked"])
        if asked is not None and asked not in names:
            raise ValueError(f"objective {asked!r} is none of this plan; it has {', '.join(names)}")
        return names[0] if asked is None else asked

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
