"""Results of LLMPerf, one entry a request: lengths without arrivals.

Format: ray-project/llmperf, `src/llmperf/common_metrics.py` at commit 1eac866f (2024); `*_individual_responses.json`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from traces.checks import Rows
from traces.schema import Trace
from traces.table import Table
from traces.tabular import finish
from traces.untimed import checked_rate, poisson_s

COLUMNS = ("number_input_tokens", "number_output_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`rate_rps` is at how many requests a second arrivals are drawn: LLMPerf records none."""

    rate_rps: float = 0.0

    def __post_init__(self) -> None:
        checked_rate(self.rate_rps)


def load(table: Table, options: Options, *, name: str, seed: int = 0, skip_bad_rows: bool = False) -> Trace:
    """The requests in the order of their entries, which is that in which they were answered; failed ones are bad."""
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    if rows.has("error_code"):
        failed = np.array([cell is not None for cell in table.columns["error_code"]])
        rows.reject("error_code", failed, "the request failed; skip bad rows")
    prompt, output = (rows.whole(field, minimum=1) for field in COLUMNS)
    good = rows.keep()
    arrival_s = np.zeros(len(prompt))
    arrival_s[good], note = poisson_s(
        int(good.sum()), options.rate_rps, seed, f"{table.source}: LLMPerf records no times"
    )
    return finish(rows, name=name, arrival_s=arrival_s, prompt=prompt, output=output, notes=(note,))
