"""A window of a simulation as a Chrome trace, for ui.perfetto.dev: a process per replica, a track per request."""

from typing import Any

import numpy as np

from kvsim.results import Result

WINDOW_REQUESTS = 2000
"""Requests shown, from the first arrival on; a viewer takes no more with ease."""

PHASES = (("queued", "arrival_s", "admitted_s"), ("prefill", "admitted_s", "first_token_s"))
DECODE = ("decode", "first_token_s", "finish_s")
COUNTERS = ("hbm_bytes", "ddr_bytes", "running", "waiting")


def perfetto_trace(result: Result) -> dict[str, Any]:
    """The first requests' phases as slices, and each replica's memory and queue over the same time as counters.

    Times are microseconds of simulated time, as the format wants. What a request did not reach has no slice.
    """
    requests, series = result.requests, result.series
    shown = min(WINDOW_REQUESTS, len(requests["arrival_s"]))
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": replica, "name": "process_name", "args": {"name": f"replica {replica}"}}
        for replica in np.unique(requests["replica"][:shown]).tolist()
    ]
    end_s = 0.0
    for i in range(shown):
        replica, name = int(requests["replica"][i]), int(requests["request"][i])
        track = {"pid": replica, "id": name, "cat": "request"}
        arguments = {
            "tenant": str(requests["tenant"][i]),
            "prompt_tokens": int(requests["prompt_tokens"][i]),
            "cached_tokens": int(requests["cached_tokens"][i]),
            "output_tokens": int(requests["output_tokens"][i]),
            "status": str(requests["status"][i]),
        }
        for phase, begin, end in (*PHASES, DECODE):
            start_s, stop_s = float(requests[begin][i]), float(requests[end][i])
            if np.isnan(start_s) or np.isnan(stop_s):
                continue
            events.append({**track, "ph": "b", "name": phase, "ts": start_s * 1e6, "args": arguments})
            events.append({**track, "ph": "e", "name": phase, "ts": stop_s * 1e6})
            end_s = max(end_s, stop_s)
    for row in np.flatnonzero(series["time_s"] <= end_s).tolist():
        at = {"ph": "C", "pid": int(series["replica"][row]), "ts": float(series["time_s"][row]) * 1e6}
        events += [{**at, "name": name, "args": {name: int(series[name][row])}} for name in COUNTERS]
    return {
        "displayTimeUnit": "ms",
        "otherData": {"requests_shown": shown, "requests": len(requests["arrival_s"])},
        "traceEvents": events,
    }
