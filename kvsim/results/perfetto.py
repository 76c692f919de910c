"""A window of a simulation as a Chrome trace, for ui.perfetto.dev: a process per replica, a track per request and lane.

Times are microseconds of simulated time, as the format wants.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kvsim.results.summary import Array, Result

MOST_REQUESTS = 2000
"""Requests shown, from the first that the window has on; a viewer takes no more with ease."""

COUNTERS = ("hbm_bytes", "ddr_bytes", "running", "waiting")
LANES = {
    "sm": "SMs",
    "h2d": "PCIe up (host to device)",
    "d2h": "PCIe down (device to host)",
    "cpu": "CPU",
    "nvlink": "NVLink",
    "host": "host thread",
    "stall": "waits for swaps",
    "load": "PCIe up, beside iterations",
    "store": "PCIe down, beside iterations",
    "handoff": "NVLink or network, to other replicas",
}

Event = dict[str, Any]
_Aways = dict[int, list[tuple[float, float]]]  # from when to when requests were preempted


def perfetto_trace(result: Result) -> dict[str, Any]:
    """What happened in a window, the one whose operations were recorded or else that of the first requests.

    Requests are slices of their phases (queued, prefix, prefill, decode, preempted) in one of their own; what a request
    did not reach has no slice. Operations are slices on their lanes; memory and queues are counters. Slices of requests
    end with the window, and their arguments say when they really began and ended.
    """
    requests = result.requests
    window_s = result.inputs.get("perfetto") or (-math.inf, math.inf)
    inside = np.flatnonzero(_overlap(requests, window_s))
    shown = inside[:MOST_REQUESTS]
    away_s = _aways(result.preempted, requests["request"][shown])
    events = [event for row in shown.tolist() for event in _request(requests, row, away_s, window_s)]
    last_s = max((event["ts"] / 1e6 for event in events), default=0.0)
    events += _operations(result.operations)
    events += _counters(result.series, window_s[0], last_s if math.isinf(window_s[1]) else window_s[1])
    events.sort(key=lambda event: event["ts"])  # stable: what begins and ends at one time stays in order
    replicas = sorted({event["pid"] for event in events})
    stages = int(result.inputs.get("pp", 1)) if result.operations is not None else 0
    return {
        "displayTimeUnit": "ms",
        "otherData": {
            "requests_shown": len(shown),
            "requests": len(inside),
            "window_s": [None if math.isinf(end) else end for end in window_s],
        },
        "traceEvents": [*_names(replicas, stages), *events],
    }


def _names(replicas: list[int], stages: int) -> Iterator[Event]:
    """Of processes and, for so many stages of operations, of threads."""
    for replica in replicas:
        yield {"ph": "M", "pid": replica, "name": "process_name", "args": {"name": f"replica {replica}"}}
        for stage in range(stages):
            for lane, name in enumerate(LANES.values()):
                own = name if stages == 1 else f"stage {stage}: {name}"
                thread = {"ph": "M", "pid": replica, "tid": _thread(stage, lane), "name": "thread_name"}
                yield {**thread, "args": {"name": own}}


def _thread(stage: int, lane: int) -> int:
    return 1 + stage * len(LANES) + lane


def _overlap(requests: dict[str, Array], window_s: tuple[float, float]) -> Array:
    gone = (requests["status"] == "rejected") & np.isnan(requests["admitted_s"])
    over_s = np.where(np.isnan(requests["finish_s"]), np.inf, requests["finish_s"])
    if "timed_out_s" in requests:
        over_s = np.fmin(over_s, requests["timed_out_s"])
    return np.asarray((requests["arrival_s"] < window_s[1]) & (over_s > window_s[0]) & ~gone)


def _aways(preempted: dict[str, Array], shown: Array) -> _Aways:
    found: _Aways = {}
    own = np.isin(preempted["request"], shown)
    for request, *ends in zip(*(preempted[name][own].tolist() for name in ("request", "from_s", "to_s")), strict=True):
        found.setdefault(request, []).append((ends[0], ends[1]))
    return found


def _request(columns: dict[str, Array], row: int, away_s: _Aways, window_s: tuple[float, float]) -> list[Event]:
    """Slices of one request's phases, in a slice of the whole."""
    number = int(columns["request"][row])
    track = {"pid": int(columns["replica"][row]), "id": number, "cat": "request"}

    def piece(name: str, from_s: float, to_s: float, figures: Mapping[str, Any]) -> list[Event]:
        begin_s, end_s = max(from_s, window_s[0]), min(to_s, window_s[1])
        if begin_s > end_s:
            return []
        arguments = {"from_s": from_s, "to_s": to_s, **figures}
        begin = {**track, "ph": "b", "name": name, "ts": begin_s * 1e6, "args": arguments}
        return [begin, {**track, "ph": "e", "name": name, "ts": end_s * 1e6}]

    phases = list(_phases(columns, row, away_s.get(number, ())))
    if not phases:
        return []
    texts = {name: str(columns[name][row]) for name in ("tenant", "status")}
    counts = ("prompt_tokens", "cached_tokens", "output_tokens", "preemptions")
    figures = {**texts, **{name: int(columns[name][row]) for name in counts}}
    whole = piece(f"request {number}", phases[0][1], phases[-1][2], figures)
    return [*whole[:1], *(event for phase in phases for event in piece(*phase, {})), *whole[1:]]


def _phases(
    columns: dict[str, Array], row: int, away_s: Sequence[tuple[float, float]]
) -> Iterator[tuple[str, float, float]]:
    """What a request did, one after the other, as far as it came: until it left, where it has timed out."""
    arrival_s, admitted_s, first_s, finish_s = (
        float(columns[name][row]) for name in ("arrival_s", "admitted_s", "first_token_s", "finish_s")
    )
    left_s = float(columns["timed_out_s"][row]) if "timed_out_s" in columns else math.nan
    queued_s = left_s if math.isnan(admitted_s) else admitted_s
    if math.isnan(queued_s):
        return
    yield "queued", arrival_s, queued_s
    if math.isnan(first_s):
        if admitted_s < left_s:
            yield "prefill", admitted_s, left_s
        return
    ready_s = admitted_s + float(columns["prefix_s"][row])
    if ready_s > admitted_s:
        yield "prefix", admitted_s, ready_s
    joined_s = first_s + (float(columns["handoff_s"][row]) if "prefill_replica" in columns else 0.0)
    handoff = [("handoff", first_s, joined_s)] if joined_s != first_s else []
    for name, from_s, to_s in (("prefill", ready_s, first_s), *handoff, ("decode", joined_s, finish_s)):
        if math.isnan(to_s):
            return
        at_s = from_s
        for gone_s, back_s in away_s:
            if from_s <= gone_s < to_s:
                yield name, at_s, gone_s
                yield "preempted", gone_s, back_s
                at_s = back_s
        yield name, at_s, to_s


def _operations(operations: dict[str, Array] | None) -> list[Event]:
    """A complete slice for each operation; those of one lane do not overlap, whatever rounding says."""
    if operations is None:
        return []
    numbers = {lane: number for number, lane in enumerate(LANES)}
    events: list[Event] = []
    free: dict[tuple[int, int], float] = {}
    for replica, stage, lane, name, layer, begin_s, end_s in zip(
        *(values.tolist() for values in operations.values()), strict=True
    ):
        track = replica, _thread(stage, numbers[lane])
        begin_us = max(begin_s * 1e6, free.get(track, 0.0))
        free[track] = end_us = max(begin_us, end_s * 1e6)
        place = {"ph": "X", "pid": replica, "tid": track[1], "name": name}
        events.append({**place, "ts": begin_us, "dur": end_us - begin_us, "args": {"layer": layer}})
    return events


def _counters(series: dict[str, Array], from_s: float, to_s: float) -> Iterator[Event]:
    """The rows of a window, and before them what was there when it began."""
    for replica in np.unique(series["replica"]).tolist():
        rows = np.flatnonzero(series["replica"] == replica)
        times_s = series["time_s"][rows]
        if times_s[0] < from_s <= times_s[-1]:
            yield from _count(replica, from_s, [np.interp(from_s, times_s, series[name][rows]) for name in COUNTERS])
        for row in rows[(times_s >= from_s) & (times_s <= to_s)].tolist():
            yield from _count(replica, float(series["time_s"][row]), [series[name][row] for name in COUNTERS])


def _count(replica: int, at_s: float, values: Sequence[Any]) -> Iterator[Event]:
    for name, value in zip(COUNTERS, values, strict=True):
        yield {"ph": "C", "pid": replica, "ts": at_s * 1e6, "name": name, "args": {name: int(value)}}
