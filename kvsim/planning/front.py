"""Which of a plan's rows comes first, and which are on the front that no other one beats."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvsim.planning.quality import loss_nats


def order(row: Mapping[str, Any]) -> tuple[bool, float, int]:
    """What rows are sorted by: those that hold by cost, then the others by how far they are from the SLO."""
    return not row["feasible"], row["usd_per_hour"] if row["feasible"] else distance(row), row["gpus"]


def distance(row: Mapping[str, Any]) -> float:
    """The largest of value / limit; infinite where there is none."""
    if row.get("unserved") or not row["slo"]:
        return math.inf
    values = [(bound["value_s"], bound["limit_s"]) for bound in row["slo"].values()]
    return max(math.inf if value_s is None else value_s / limit_s for value_s, limit_s in values)


def mark_front(rows: Sequence[dict[str, Any]]) -> None:
    """Mark the plans that no other one beats in cost, in distance from the SLO and in quality together."""
    feasible = [row for row in rows if row["feasible"]]
    for row in feasible:
        row["pareto"] = not any(_beats(other, row) for other in feasible if other is not row)


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a plan is as good in everything and better in something; qualities not measured compare with nothing."""
    losses = loss_nats(one["quality"]), loss_nats(other["quality"])
    if one["policy"] == other["policy"] or losses[0] == 0.0:
        better, worse = False, False
    elif None in losses:
        return False
    else:
        better, worse = losses[0] < losses[1], losses[0] > losses[1]  # type: ignore[operator]
    figures = [(row["usd_per_hour"], distance(row)) for row in (one, other)]
    worse = worse or any(mine > theirs for mine, theirs in zip(*figures, strict=True))
    better = better or any(mine < theirs for mine, theirs in zip(*figures, strict=True))
    return better and not worse
