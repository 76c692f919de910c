"""Request logs of SGLang servers: the lines of `--log-requests`, as text or JSON (`--log-requests-format`).

Formats: sgl-project/sglang, `python/sglang/srt/utils/request_logger.py` at commit 01bb9120 (2026); lines as in that
project's issues 8756 (0.4) and 25887 (0.5.10, a finish line without a clock because it went to a log target).

A request is one finish line: its `meta_info` has both lengths. It arrived at the first of these that every finish line
has: `request_received_ts` (to the microsecond), the clock of its receive line (whole seconds in text logs), the clock
of its finish line less its `e2e_latency`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from traces.arrivals import spread
from traces.checks import Rows
from traces.log_text import cell, clock_s, without_text
from traces.schema import Floats, Trace, TraceError
from traces.table import Table

_TEXT = re.compile(r"""(?P<head>[^'"{(]*?)\b(?P<event>Receive|Finish): obj=GenerateReqInput\((?P<rest>.*)""", re.DOTALL)
_JSON = re.compile(r"""[^'"]*?(?=\{"timestamp": ")""")
_HEAD = re.compile(
    r'\{"timestamp": "(?P<time>[^"]*)", "event": "request\.(?P<event>received|finished)", "rid": "(?P<rid>[^"]*)"'
)
_STAMP = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)")
_RID = re.compile(r"\brid='([^']*)'")
_META = "'meta_info': {"
_HEALTH = "HEALTH_CHECK"
CLOCKS = ("request_received_ts", "the receive line", "the finish line less e2e_latency")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`spread_s` moves every arrival later by a uniform draw from [0, spread_s), for clocks of whole seconds."""

    spread_s: float = 0.0


@dataclass(slots=True)
class _Request:
    line: int
    received_s: float = np.nan
    finished_s: float = np.nan
    meta: dict[str, Any] | None = None

    def arrivals_s(self) -> tuple[float, ...]:
        """By each of CLOCKS; NaN where the log does not say."""
        meta = self.meta or {}
        return _number(meta.get(CLOCKS[0])), self.received_s, self.finished_s - _number(meta.get("e2e_latency"))


def is_request(line: str) -> bool:
    """Whether the line is one of an SGLang request log."""
    return _event(line) is not None


def load(
    lines: Iterable[tuple[int, str]],
    options: Options,
    *,
    source: str,
    name: str,
    seed: int = 0,
    skip_bad_rows: bool = False,
) -> Trace:
    """The finished requests of a log's numbered lines; one that was received and not finished is a bad row."""
    requests, probes = _read(lines)
    if not requests:
        raise TraceError(f"{source}: empty trace: no requests but {probes} health checks; log one that serves clients")
    fields = ("prompt_tokens", "completion_tokens")
    columns = {field: [cell((request.meta or {}).get(field)) for request in requests] for field in fields}
    table = Table(source=source, is_text=True, columns=columns, lines=[request.line for request in requests])
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    unfinished = np.array([request.meta is None for request in requests])
    rows.reject("completion_tokens", unfinished, "the request's finish line is missing or cut; skip bad rows")
    prompt, output = (rows.whole(field, minimum=1) for field in fields)
    clock, arrival_s = _arrivals_s([request for request in requests if request.meta is not None], source)
    time_s = np.full(len(requests), np.nan)
    time_s[~unfinished] = arrival_s
    keep = rows.keep()
    first_s = time_s[keep].min()
    notes = [f"arrivals are by {clock}; time 0 is {np.datetime64(int(first_s * 1e6), 'us')} by the server's clock"]
    if probes:
        notes.append(f"{probes} health checks of the server were left out")
    trace = Trace.from_columns(
        name=name,
        arrival_s=np.round(time_s[keep] - first_s, 6),  # the clocks' own precision; the sum's rounding error goes
        prompt_tokens=prompt[keep],
        output_tokens=output[keep],
        skipped_rows=rows.skipped_rows,
        notes=notes,
    )
    return spread(trace, options.spread_s, seed)


def _read(lines: Iterable[tuple[int, str]]) -> tuple[list[_Request], int]:
    """The requests in the order of their first lines, and the number of health checks."""
    requests: list[_Request] = []
    latest: dict[str, _Request] = {}
    probes: set[str] = set()
    for number, line in lines:
        event = _event(line)
        if event is None:
            continue
        kind, rid, time_s, meta = event
        if rid.startswith(_HEALTH):
            probes.add(rid)
            continue
        if kind == "Receive":
            requests.append(_Request(number, received_s=time_s))
            latest[rid] = requests[-1]
            continue
        request = latest.pop(rid, None)
        if request is None:  # received before the log began, or as part of a batch
            request = _Request(number)
            requests.append(request)
        request.finished_s, request.meta = time_s, meta
    return requests, len(probes)


def _event(line: str) -> tuple[str, str, float, dict[str, Any] | None] | None:
    """("Receive" or "Finish", rid, clock, meta_info) of a line of the request log, None of any other line."""
    text = _TEXT.match(line)
    if text:
        stamp, rest = _STAMP.search(text["head"]), without_text(text["rest"])
        rid, start = _RID.search(rest), rest.rfind(_META)
        if rid is None and text["event"] == "Receive":  # a batch: its parts finish one by one
            return None
        meta = None if start < 0 else dict(re.findall(r"'(\w+)': ([^,{}\[\]]+)", rest[start + len(_META) :]))
        return text["event"], rid[1] if rid else "", clock_s(stamp[1] if stamp else None), meta
    found = _JSON.match(line)
    head = found and _HEAD.match(line, found.end())
    if not found or not head:
        return None
    meta = None
    try:
        entry = json.loads(line[found.end() :])
        meta = entry["out"]["meta_info"] if head["event"] == "finished" else None
    except (ValueError, RecursionError, KeyError, TypeError):
        pass  # a line that was cut: its request stays without a finish line
    kind = "Receive" if head["event"] == "received" else "Finish"
    return kind, head["rid"], clock_s(head["time"]), meta if isinstance(meta, dict) else None


def _arrivals_s(requests: list[_Request], source: str) -> tuple[str, Floats]:
    """The first of CLOCKS that all these requests have, and their arrivals by it."""
    times = np.array([request.arrivals_s() for request in requests]).reshape(-1, len(CLOCKS))
    whole = ~np.isnan(times).any(axis=0)
    if not whole.any():
        raise TraceError(f"{source}: no clock that all requests have; log with {', with '.join(CLOCKS)}")
    column = int(np.argmax(whole))
    return CLOCKS[column], times[:, column]


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return np.nan
    return number if np.isfinite(number) else np.nan
