"""What each request's latency was spent on: shares that add up to it.

A request waits in a queue until it is admitted (`queue`, with what comes before the scheduler hears of it), for its
cached prefix to come up from DDR and the iteration under way to end (`prefix`), while it is preempted (`swap`, with the
iterations that wait for anybody's swaps), and for its state to get to the replica where it decodes and has room
(`handoff`). All other time it spends in a batch, and an iteration's time is that of whatever bounds it:

- while the SMs work, the part of each kernel that is longer, arithmetic (`compute`) or transfers (`hbm`); weights are
  streamed and then multiplied, so both count; launches and the host's part of iterations are `overhead`;
- while the SMs wait, the lanes that they wait for, in proportion to the time that each works: copies over PCIe with
  their latencies (`pcie`, both directions), collectives (`nvlink`, also where a GPU without it sends them over PCIe),
  searches and gathers of the host (`cpu`), and waits of the host for the GPU (`overhead`).

So `pcie + nvlink + cpu` is what infinitely fast links and processors beside the SMs would save of these iterations. In
the `op` fidelity what an iteration loses to other GPUs of its host is `pcie` and `cpu`, in proportion to its own work.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvsim.engine.state.cluster import Records
from kvsim.iteration.busy import BOUNDS, OVERHEAD

CAUSES = ("queue", "prefix", *BOUNDS, OVERHEAD)
"""Columns `<cause>_s` of a request's latency, and but for the first `ttft_<cause>_s` of its time to first token."""

WAITS = ("queue", "prefix")  # for others' requests rather than for a part of the machine
PHASES = ("e2e", "ttft", "decode")

Floats = NDArray[np.float64]


def columns(requests: Records) -> dict[str, Floats]:
    """Seconds by cause of each request up to its last and to its first token, NaN where it has none."""
    ready_s = requests["admitted_s"] + requests["prefix_s"]  # adds up with the waits, but for rounding
    found = {"prefix_s": np.where(np.isnan(requests["first_token_s"]), np.nan, requests["prefix_s"])}
    for end, bounds, prefix in (("finish_s", "bound_s", ""), ("first_token_s", "ttft_bound_s", "ttft_")):
        left_s = requests[end] - ready_s
        for i, name in enumerate(BOUNDS):
            own_s = np.where(np.isnan(left_s), np.nan, requests[bounds][:, i])
            found[f"{prefix}{name}_s"] = own_s
            left_s -= own_s
        found[f"{prefix}overhead_s"] = left_s
    return found


def spent_s(columns: Mapping[str, NDArray[Any]], phase: str) -> dict[str, Floats]:
    """Seconds by cause of one of PHASES for each request, from its columns."""
    waits = {"queue": columns["admitted_s"] - columns["arrival_s"], "prefix": columns["prefix_s"]}
    inside = [name for name in CAUSES if name not in WAITS]
    first = {name: columns[f"ttft_{name}_s"] for name in inside}
    if phase == "ttft":
        return {**waits, **first}
    whole = {name: columns[f"{name}_s"] for name in inside}
    if phase == "e2e":
        return {**waits, **whole}
    nothing = np.zeros(len(columns["prefix_s"]))
    return {**dict.fromkeys(WAITS, nothing), **{name: whole[name] - first[name] for name in inside}}


def attribution(columns: Mapping[str, NDArray[Any]], rows: NDArray[np.intp]) -> dict[str, dict[str, Any]]:
    """For each of PHASES the `mean_s` that the requests in `rows` spent on each cause, and the mean of its share.

    Both add up over the causes: to the mean latency, and to 1. Requests of one output token have no decode phase; of
    an empty sample everything is None.
    """
    found: dict[str, dict[str, Any]] = {}
    for phase in PHASES:
        own = rows[columns["output_tokens"][rows] > 1] if phase == "decode" else rows
        spent = np.stack([seconds[own] for seconds in spent_s(columns, phase).values()])
        if not len(own):
            found[phase] = {figure: dict.fromkeys(CAUSES) for figure in ("mean_s", "mean_share")}
            continue
        shares = spent / spent.sum(axis=0)
        found[phase] = {
            "mean_s": dict(zip(CAUSES, spent.mean(axis=1).tolist(), strict=True)),
            "mean_share": dict(zip(CAUSES, shares.mean(axis=1).tolist(), strict=True)),
        }
    return found


def bottleneck(mean_s: Mapping[str, float | None]) -> str | None:
    """The part of the machine that requests spent most time on, once admitted."""
    known = {name: seconds for name, seconds in mean_s.items() if seconds is not None and name not in WAITS}
    return max(known, key=lambda name: known[name], default=None)
