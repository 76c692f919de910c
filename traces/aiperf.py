"""Records of NVIDIA AIPerf (`profile_export.jsonl`): when each request was sent, and its lengths.

Format: ai-dynamo/aiperf, `examples/artifacts/run1/profile_export.jsonl` at commit 7c31f579 (2025, `timestamp_ns`,
`credit_phase`); later versions have `request_start_ns` and `benchmark_phase`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from traces.checks import Rows
from traces.deltas import are_deltas, checked_turns, turns_before, whole
from traces.schema import Trace
from traces.table import Table
from traces.tabular import finish

COLUMNS = ("metadata", "metrics")
LENGTHS = ("input_sequence_length", "output_sequence_length")
STARTS = ("request_start_ns", "timestamp_ns")
PHASES = ("benchmark_phase", "credit_phase")
SESSION = "x_correlation_id"


def is_aiperf(table: Table) -> bool:
    """Whether some row has AIPerf's metrics."""
    if not set(COLUMNS) <= set(table.columns):
        return False
    known = {*LENGTHS, "error_request_count"}
    return any(isinstance(cell, dict) and known & set(cell) for cell in table.columns["metrics"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`turns` says whether the lengths of a session's turns are those of `whole` prompts or a `delta`."""

    turns: str = ""

    def __post_init__(self) -> None:
        checked_turns(self.turns)


def load(table: Table, options: Options, *, name: str, skip_bad_rows: bool = False) -> Trace:
    """The profiled requests, the first one sent at time 0; the warm-up is left out, a failed request is a bad row."""
    metadata, metrics = (table.columns[field] for field in COLUMNS)
    errors = table.columns.get("error", [None] * len(table.lines))
    start = next((field for field in STARTS if any(_of(cell, field) is not None for cell in metadata)), STARTS[0])
    columns: dict[str, list[Any]] = {
        start: [_of(cell, start) for cell in metadata],
        "error": [_of(cell, "type") or "yes" if cell else None for cell in errors],
        **{field: [_metric(cell, field) for cell in metrics] for field in LENGTHS},
    }
    requests = Table(source=table.source, columns=columns, lines=table.lines, skipped_rows=table.skipped_rows)
    rows = Rows(requests, skip_bad_rows=skip_bad_rows)
    warm = np.array([any(_of(cell, field) == "warmup" for field in PHASES) for cell in metadata])
    rows.leave_out(warm)
    failed = np.array([cell is not None for cell in columns["error"]])
    rows.reject("error", failed, "the request failed or was cancelled; skip bad rows")
    times_ns = rows.nanoseconds(start)
    prompt, output = (rows.whole(field, minimum=1) for field in LENGTHS)
    several = any(_of(cell, "turn_index") not in (None, 0) for cell in metadata)
    requests.columns["session"] = [_of(cell, SESSION) if several else None for cell in metadata]
    first_ns = int(times_ns[rows.keep()].min())
    notes = [f"time 0 is {np.datetime64(first_ns, 'ns')} UTC"]
    before = turns_before(rows.sessions("session"))
    if options.turns == "delta" or (not options.turns and are_deltas(rows, prompt, output, [], before)):
        prompt = whole(rows, LENGTHS[0], prompt, output, before, [])
        notes.append("lengths are those of the messages: prompts are that and all turns and answers before")
    if warm.any():
        notes.append(f"{int(warm.sum())} requests of the warm-up were left out")
    arrival_s = (times_ns - first_ns) / 1e9
    return finish(rows, name=name, arrival_s=arrival_s, prompt=prompt, output=output, notes=tuple(notes))


def _of(cell: Any, field: str) -> Any:
    return cell.get(field) if isinstance(cell, dict) else None


def _metric(cell: Any, field: str) -> Any:
    return _of(_of(cell, field), "value")
