"""Mooncake's request traces (Qin et al., FAST 2025): arrivals, lengths, and one prefix hash per 512-token block."""

from __future__ import annotations

from dataclasses import dataclass

from traces.arrivals import spread
from traces.schema import Trace
from traces.table import Table
from traces.tabular import Columns, from_table

COLUMNS = Columns(arrival="timestamp", prompt="input_length", output="output_length", units_per_s=1000)
BLOCK_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`spread_s` moves every arrival later by a uniform draw from [0, spread_s).

    The conversation trace records arrivals in ticks of about 3 s; 3 spreads the requests of a tick over it.
    """

    spread_s: float = 0.0


def load(table: Table, options: Options, *, name: str, seed: int = 0, skip_bad_rows: bool = False) -> Trace:
    """The trace of a table with Mooncake's columns; a partial last block has an id too."""
    trace = from_table(table, name=name, skip_bad_rows=skip_bad_rows, columns=COLUMNS, block_tokens=BLOCK_TOKENS)
    return spread(trace, options.spread_s, seed)
