"""Runs beside each other, for notebooks: their figures as a table, and the charts of the report page."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsim.notebook.figures import pandas, shown
from kvsim.report import tables
from kvsim.report.page import Page, fragment
from kvsim.report.run_charts import cdf_chart, occupancy_chart
from kvsim.report.runs import runs_of
from kvsim.results.row import Value, figures
from kvsim.results.summary import Result
from kvsim.run.simulate import simulate
from kvsim.scenario.setup import Setup
from traces import Trace

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_LATENCIES, _TIERS = ("ttft_s", "tpot_s"), ("hbm", "ddr")


class Comparison:
    """Results beside each other, which a notebook shows as a table; `summaries` are those of `summarize`."""

    def __init__(self, results: Sequence[Result], slo: Mapping[str, float] | None = None, warmup_s: float = 0) -> None:
        """Of one result or more, with the statistics of `summarize`. Raises ValueError as that does, and for none."""
        if not results:
            raise ValueError("there are 0 results to compare; a comparison needs at least 1")
        self.results = list(results)
        self._runs, self._warmup_s = runs_of(results, slo, warmup_s), warmup_s

    @property
    def summaries(self) -> list[dict[str, Any]]:
        """The dictionary of `summary.json` of each."""
        return [run.summary for run in self._runs]

    def rows(self) -> list[dict[str, Value]]:
        """The figures that compare runs, by names with dots, a row for each run."""
        return [{"policy": run.label, **figures(run.summary)} for run in self._runs]

    def to_pandas(self) -> Any:
        """`rows` as a table; pandas must be installed."""
        return pandas().DataFrame(self.rows())

    def plot_latency(self, latency: str = "ttft_s") -> "Figure":
        """How many requests had a latency (`ttft_s` or `tpot_s`) within which time, a line for each run."""
        _check("latency", latency, _LATENCIES)
        page = Page()
        return shown(page, cdf_chart(page, self._runs, latency, self._warmup_s))

    def plot_memory(self, tier: str = "hbm") -> "Figure":
        """Bytes in `hbm` or `ddr` over time, a line for each run."""
        _check("tier", tier, _TIERS)
        page = Page()
        return shown(page, occupancy_chart(page, self._runs, tier))

    def __repr__(self) -> str:
        return f"Comparison of {', '.join(run.label for run in self._runs)}"

    def _repr_html_(self) -> str:
        return fragment(repr(self), [tables.comparison(self._runs)])


def compare(
    trace: Trace, setups: Sequence[Setup], *, slo: Mapping[str, float] | None = None, warmup_s: float = 0
) -> Comparison:
    """Replay a trace with each of the setups, one after the other. Raises ValueError as `simulate` does."""
    return Comparison([simulate(trace, setup) for setup in setups], slo, warmup_s)


def _check(what: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise ValueError(f"{what} {given!r} is not drawn; choose one of {', '.join(known)}")
