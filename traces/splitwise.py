"""Traces of splitwise-sim (Patel et al., ISCA 2024): arrivals in seconds, prompt and output lengths.

Format: Mutinifni/splitwise-sim, `traces/test_trace.csv` at commit 37808801 (2024).
"""

from __future__ import annotations

import numpy as np

from traces.checks import Rows, ignored_columns_note
from traces.schema import Trace
from traces.table import Table
from traces.tabular import finish
from traces.units import TimeUnit, seconds

COLUMNS = ("arrival_timestamp", "prompt_size", "token_size")
BATCH = "batch_size"


def load(table: Table, options: TimeUnit, *, name: str, skip_bad_rows: bool = False) -> Trace:
    """The trace of a table with splitwise-sim's columns; a row of several sequences is bad."""
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    times = rows.seconds(COLUMNS[0])
    prompt, output = (rows.whole(field, minimum=1) for field in COLUMNS[1:])
    if rows.has(BATCH):
        rows.reject(BATCH, rows.numbers(BATCH) != 1, "must be 1: a request is one sequence; write a row for each")
    times[~rows.keep()] = np.nan
    arrival_s, notes = seconds(times, options.time_unit or "s")
    notes = (*notes, *ignored_columns_note(table, (*COLUMNS, BATCH)))
    return finish(rows, name=name, arrival_s=arrival_s, prompt=prompt, output=output, notes=notes)
