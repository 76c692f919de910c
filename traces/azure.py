"""Azure's LLM inference traces (Patel et al., ISCA 2024): wall-clock arrivals and lengths of production services."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from traces.checks import Rows, ignored_columns_note
from traces.schema import Trace
from traces.table import Table
from traces.tabular import finish

_TIME = re.compile(
    r"((?:19|20)\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|([+-])([01]\d|2[0-3]):?([0-5]\d))?", re.ASCII
)
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def load(table: Table, *, name: str, skip_bad_rows: bool = False) -> Trace:
    """The trace of a table with Azure's columns; time 0 is the earliest arrival, whose clock time a note keeps."""
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    times = clock_ns([str(cell) for cell in table.columns["TIMESTAMP"]])
    rows.reject("TIMESTAMP", np.isnat(times), "must be a time written YYYY-MM-DD hh:mm:ss.fffffff, in UTC or +hh:mm")
    prompt = rows.whole("ContextTokens", minimum=1)
    output = rows.whole("GeneratedTokens", minimum=1)
    first = times[rows.keep()].min()
    notes = (f"time 0 is {first} UTC", *ignored_columns_note(table, COLUMNS))
    arrival_s = (times - first).astype(np.int64) / 1e9
    return finish(rows, name=name, arrival_s=arrival_s, prompt=prompt, output=output, notes=notes)


def clock_ns(texts: list[str]) -> NDArray[np.datetime64]:
    """Times of ISO 8601 as datetime64[ns] in UTC, which those without a zone are in; NaT where a text is no time."""
    # numpy would also read "today", a bare year and the like, and does not read zones.
    found = [_TIME.fullmatch(text) for text in texts]
    plain = [match[1] if match else "NaT" for match in found]
    try:
        times = np.array(plain, "datetime64[ns]")
    except ValueError:
        times = np.array([_one_clock_ns(text) for text in plain], "datetime64[ns]")
    ahead = [
        (-1 if match[2] == "-" else 1) * (60 * int(match[3]) + int(match[4])) if match and match[2] else 0
        for match in found
    ]
    return np.asarray(times - np.array(ahead, "timedelta64[m]"))


def _one_clock_ns(text: str) -> np.datetime64:
    try:
        return np.datetime64(text, "ns")
    except ValueError:
        return np.datetime64("NaT")
