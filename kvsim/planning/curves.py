"""What a plan's document says of loads: latencies and goodput against what is offered, and the knee."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvsim.planning.findings import Findings
from kvsim.planning.loads import rate_scale
from kvsim.planning.measured import Measured
from kvsim.planning.simulations import Key
from traces import Trace

if TYPE_CHECKING:
    from kvsim.planning.question import Question


def curve_of(question: "Question", findings: Findings, fleet: Key, trace: Trace) -> list[dict[str, Any]]:
    """Goodput and each objective's value of a fleet at every load that was tried, the lowest first."""
    span_s = float(trace.arrival_s[-1] - trace.arrival_s[0])
    rate_rps = len(trace) / span_s if span_s > 0 else None
    return [
        {
            "rate_scale": rate_scale(load),
            "offered_rps": None if rate_rps is None else rate_rps * rate_scale(load),
            "goodput_rps": one.good_rps,
            "slo": {
                name: value_s if math.isfinite(value_s) and not one.unserved else None
                for name, value_s in one.values_s.items()
            },
            "holds": one.ratio(question.objectives) <= 1,
            "binding": one.binding(question.objectives),
            "bottleneck": one.bottleneck,
        }
        for load, one in _measured(findings, fleet).items()
    ]


def load_of(question: "Question", findings: Findings, index: int, traces: Sequence[Trace]) -> dict[str, Any]:
    """The curve of a family's best fleet, what is the most that holds, and what breaks beyond it."""
    bracket, fleet = findings.found.load, findings.best(index)
    measured = _measured(findings, fleet)
    holds = None if bracket is None else bracket.holds
    breaks = None if bracket is None else bracket.breaks
    knee = measured.get(breaks) if breaks is not None else None
    shown = knee or measured.get(0)
    return {
        "headroom": None if holds is None else rate_scale(holds) - 1,
        "holds_at": None if holds is None else rate_scale(holds),
        "breaks_at": None if breaks is None else rate_scale(breaks),
        "breaks": None if knee is None else knee.binding(question.objectives),
        "bottleneck": None if shown is None else shown.bottleneck,
        "curve": curve_of(question, findings, fleet, traces[0]),
    }


def _measured(findings: Findings, fleet: Key) -> dict[int, Measured]:
    """What was simulated of a fleet, by LOAD_STEPs, the lowest load first."""
    found = {
        key.load: one
        for key, one in findings.simulations.done.items()
        if key._replace(load=0) == fleet and isinstance(one, Measured)
    }
    return dict(sorted(found.items()))
