"""Azure's LLM inference traces (Patel et al., ISCA 2024): wall-clock arrivals and lengths of production services."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from traces.checks import Rows, ignored_columns_note
from traces.schema import Trace
from traces.table import Table

_TIME = re.compile(r"(19|20)\d\d-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?(\+00:00)?")
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def load(table: Table, *, name: str, skip_bad_rows: bool = False) -> Trace:
    """The trace of a table with Azure's columns; time 0 is the earliest arrival, whose clock time a note keeps."""
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    times = _clock_ns([str(cell) for cell in table.columns["TIMESTAMP"]])
    rows.reject("TIMESTAMP", np.isnat(times), "must be a time written YYYY-MM-DD hh:mm:ss.fffffff, in UTC")
    prompt = rows.whole("ContextTokens", minimum=1)
    output = rows.whole("GeneratedTokens", minimum=1)
    keep = rows.keep()
    first = times[keep].min()
    return Trace.from_columns(
        name=name,
        arrival_s=(times[keep] - first).astype(np.int64) / 1e9,
        prompt_tokens=prompt[keep],
        output_tokens=output[keep],
        skipped_rows=rows.skipped_rows,
        notes=(f"time 0 is {first} UTC", *ignored_columns_note(table, COLUMNS)),
    )


def _clock_ns(texts: list[str]) -> NDArray[np.datetime64]:
    """Times as datetime64[ns], NaT where a text is no time."""
    # numpy would also read "today", a bare year and the like.
    plain = [text.removesuffix("+00:00") if _TIME.fullmatch(text) else "NaT" for text in texts]
    try:
        return np.array(plain, "datetime64[ns]")
    except ValueError:
        return np.array([_one_clock_ns(text) for text in plain], "datetime64[ns]")


def _one_clock_ns(text: str) -> np.datetime64:
    try:
        return np.datetime64(text, "ns")
    except ValueError:
        return np.datetime64("NaT")
