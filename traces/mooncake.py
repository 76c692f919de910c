"""Mooncake's request traces (Qin et al., FAST 2025): arrivals, lengths, and one prefix hash per 512-token block."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from traces.schema import Trace, TraceError
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

    def __post_init__(self) -> None:
        if not (math.isfinite(self.spread_s) and self.spread_s >= 0):
            raise TraceError(f"spread_s={self.spread_s}: must be finite and not negative; 0 keeps recorded arrivals")


def load(table: Table, options: Options, *, name: str, seed: int = 0, skip_bad_rows: bool = False) -> Trace:
    """The trace of a table with Mooncake's columns; a partial last block has an id too."""
    trace = from_table(table, name=name, skip_bad_rows=skip_bad_rows, columns=COLUMNS, block_tokens=BLOCK_TOKENS)
    if not options.spread_s:
        return trace
    # Sorting the shifted times and leaving the rows in place keeps the recorded order of the requests.
    shifted = trace.arrival_s + np.random.default_rng(seed).uniform(0, options.spread_s, len(trace))
    note = f"arrivals spread by up to {options.spread_s:g} s (seed {seed})"
    return replace(trace, arrival_s=np.sort(shifted), notes=(*trace.notes, note))
