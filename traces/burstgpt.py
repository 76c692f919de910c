"""BurstGPT's traces (Wang et al., arXiv:2401.17644): arrivals in seconds and lengths of a campus's ChatGPT and GPT-4.

Format: HPMLL/BurstGPT, `README.md` and the files of releases 1.1 (six columns) and 2.0 (Session ID and Elapsed time
besides). A request without response tokens failed, as that text says.
"""

from __future__ import annotations

import numpy as np

from traces.checks import Rows, ignored_columns_note
from traces.schema import Trace
from traces.table import Table
from traces.tabular import finish
from traces.units import UNITS_PER_S, TimeUnit

COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
SESSION = "Session ID"
_LATE_S = 86_400  # later files go on counting where others ended: their own first request is time 0


def load(table: Table, options: TimeUnit, *, name: str, skip_bad_rows: bool = False) -> Trace:
    """The requests that were answered; the others are left out and counted."""
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    failed = rows.numbers(COLUMNS[2]) == 0
    rows.leave_out(failed)
    times = rows.seconds(COLUMNS[0])
    prompt, output = (rows.whole(field, minimum=1) for field in COLUMNS[1:])
    session = rows.sessions(SESSION) if rows.has(SESSION) else None
    unit, first = options.time_unit or "s", times[rows.keep()].min()
    first = first if first >= _LATE_S * UNITS_PER_S[unit] else 0.0
    notes = [f"time 0 is {COLUMNS[0]} {first:.15g}"] if first else []
    if failed.any():
        notes.append(f"{int(failed.sum())} requests without response tokens failed and were left out")
    return finish(
        rows,
        name=name,
        arrival_s=(times - first) / UNITS_PER_S[unit],
        prompt=prompt,
        output=output,
        session=session,
        think_s=np.full(len(times), np.nan),
        notes=(*notes, *ignored_columns_note(table, (*COLUMNS, SESSION))),
    )
