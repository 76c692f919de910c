"""Latencies that clients of a server recorded, request by request, whichever tool wrote them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvsim.observed import formats
from policies.shown import shown
from traces import Trace, TraceError
from traces.files import check_regular
from traces.schema import Floats
from traces.table import Table, read_table

_RUN = re.compile(r"(?P<path>.+):run=(?P<run>\d{1,6})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Finished requests in the order in which they were sent: `trace` has times and lengths.

    `ttft_s` and `tpot_s` are what the client measured: from sending to the first token, and the mean time between two
    tokens, NaN of a request with one. `written_by` names the tool, `failed` counts requests that did not finish.
    """

    source: str
    written_by: str
    trace: Trace
    ttft_s: Floats
    tpot_s: Floats
    failed: int
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.trace)


class _Format(NamedTuple):
    written_by: str
    columns: tuple[str, ...]
    read: Callable[[Table, int], formats.Columns]


FORMATS = (
    _Format("kvsim observe", formats.OBSERVE, formats.of_observe),
    _Format("vllm bench serve", formats.VLLM, formats.of_vllm),
    _Format("GuideLLM", formats.GUIDELLM, formats.of_guidellm),
    _Format("AIPerf", formats.AIPERF, formats.of_aiperf),
)
"""Who writes such records, the columns that tell it, and how they are read."""


def read_records(text: str) -> Records:
    """The records of a file; `FILE:run=2` is the second run or benchmark of a file of several.

    Raises TraceError for a file that holds no such records, or none of a request that finished.
    """
    path, run = Path(text), 0
    if not path.exists() and (named := _RUN.fullmatch(text)):
        path, run = Path(named["path"]), int(named["run"])
    check_regular(path)
    table = read_table(path)
    for known in FORMATS:
        if set(known.columns) <= set(table.columns):
            return _records(known, known.read(table, run), str(path))
    written = ", ".join(known.written_by for known in FORMATS)
    has = shown(", ".join(table.columns))
    raise TraceError(f"{path}: has {has}: no records of requests' latencies; they are written by {written}")


def _records(known: _Format, found: formats.Columns, source: str) -> Records:
    order = np.argsort(found.sent_s, kind="stable")
    first_s = found.sent_s[order[0]]
    trace = Trace.from_columns(
        name=Path(source).name,
        arrival_s=np.round(found.sent_s[order] - first_s, 9),
        prompt_tokens=found.prompt_tokens[order],
        output_tokens=found.output_tokens[order],
    )
    return Records(
        source=source,
        written_by=known.written_by,
        trace=trace,
        ttft_s=found.ttft_s[order],
        tpot_s=np.where(trace.output_tokens > 1, found.tpot_s[order], np.nan),
        failed=found.failed,
        notes=found.notes,
    )
