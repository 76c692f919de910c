"""Records of `kvsim observe`: when each request was sent, and the server's own counts of its tokens.

Format: `docs/observe.md`. The first line says what was asked of whom; requests that failed are left out.
"""

from __future__ import annotations

import numpy as np

from traces.checks import Rows
from traces.schema import Trace, TraceError
from traces.table import Table
from traces.tabular import finish

HEAD = "kvsim_observe"
COLUMNS = (HEAD, "status", "sent_s")
LENGTHS = ("prompt_tokens", "output_tokens")
FINISHED = "finished"


def rows_of(table: Table, *, skip_bad_rows: bool = False) -> Rows:
    """The rows of requests that finished; TraceError where there are none."""
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    gone = np.array([status != FINISHED for status in table.columns["status"]])
    if gone.all():
        raise TraceError(f"{table.source}: status: no request finished; observe a server that answers")
    rows.leave_out(gone)
    return rows


def load(table: Table, _options: object = None, *, name: str, skip_bad_rows: bool = False) -> Trace:
    """The requests that finished, the first one sent at time 0."""
    rows = rows_of(table, skip_bad_rows=skip_bad_rows)
    sent_s = rows.seconds("sent_s")
    prompt, output = (rows.whole(field, minimum=1) for field in LENGTHS)
    first_s = float(sent_s[rows.keep()].min())
    failed = sum(status is not None and status != FINISHED for status in table.columns["status"])
    notes = (f"{failed} requests that did not finish are not in the trace, though they were sent",) if failed else ()
    arrival_s = np.round(sent_s - first_s, 6)  # as precise as they were written
    return finish(rows, name=name, arrival_s=arrival_s, prompt=prompt, output=output, notes=notes)
