"""Reports of GuideLLM (`benchmarks.json`): when each request was sent, and its lengths.

Format: vllm-project/guidellm, `src/guidellm/schemas/base/request_stats.py` at commit 31c74ea2 (2026,
`request_start_time`); versions before 0.4 have `start_time`. Texts in it are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from traces.checks import Rows
from traces.schema import Trace, TraceError
from traces.table import Table
from traces.tabular import finish

COLUMN = "benchmarks"
LENGTHS = ("prompt_tokens", "output_tokens")
STARTS = ("request_start_time", "start_time")
UNFINISHED = ("incomplete", "errored")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`run` is the number, from 1, of the benchmark in a report of several; 0 takes the only one."""

    run: int = 0


def load(table: Table, options: Options, *, name: str, skip_bad_rows: bool = False) -> Trace:
    """The successful requests of one benchmark, its first at time 0; in errors the number is the request's, from 1."""
    runs = [run for cell in table.columns[COLUMN] for run in (cell if isinstance(cell, list) else [cell])]
    if len(runs) > 1 and not options.run:
        raise TraceError(
            f"{table.source}: holds {len(runs)} benchmarks; choose one with the option run=1 to run={len(runs)}"
        )
    if not 0 <= options.run <= len(runs) or not runs:
        raise TraceError(f"{table.source}: run={options.run}: must be from 1 to {len(runs)}")
    by_status = _of(runs[max(options.run, 1) - 1], "requests")
    requests = _of(by_status, "successful")
    if not isinstance(requests, list) or not requests or not all(isinstance(request, dict) for request in requests):
        raise TraceError(
            f"{table.source}: requests.successful: must list the benchmark's requests; save the report as JSON, whole"
        )
    start = next((field for field in STARTS if any(field in request for request in requests)), STARTS[0])
    columns = {field: [request.get(field) for request in requests] for field in (start, *LENGTHS)}
    rows = Rows(
        Table(source=table.source, columns=columns, lines=list(range(1, len(requests) + 1))),
        skip_bad_rows=skip_bad_rows,
    )
    times = rows.seconds(start)
    prompt, output = (rows.whole(field, minimum=1) for field in LENGTHS)
    first = times[rows.keep()].min()
    left = sum(len(found) for field in UNFINISHED if isinstance(found := _of(by_status, field), list))
    notes = [f"time 0 is {first:.6f} s since 1970"]
    if left:
        notes.append(f"{left} requests that failed or were cut off are not in the trace, though they were sent")
    return finish(
        rows,
        name=name,
        arrival_s=np.round(times - first, 6),  # the precision of such a clock; the difference's rounding error goes
        prompt=prompt,
        output=output,
        notes=tuple(notes),
    )


def _of(cell: Any, field: str) -> Any:
    return cell.get(field) if isinstance(cell, dict) else None
