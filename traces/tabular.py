"""The plain table of requests: the project's own format, in CSV, JSON lines or Parquet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from traces.checks import Rows, ignored_columns_note
from traces.schema import Trace, TraceError
from traces.table import Table

OPTIONAL = ("tenant", "session", "think_s", "block_tokens", "hash_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """What a format calls its three required columns, and how many units of its arrival column make a second."""

    arrival: str = "arrived_at"
    prompt: str = "num_prefill_tokens"
    output: str = "num_decode_tokens"
    units_per_s: int = 1

    @property
    def required(self) -> tuple[str, str, str]:
        """The three column names."""
        return self.arrival, self.prompt, self.output


PLAIN = Columns()


def from_table(
    table: Table, *, name: str, skip_bad_rows: bool = False, columns: Columns = PLAIN, block_tokens: int = 0
) -> Trace:
    """A trace from the required columns and whichever of OPTIONAL there are; `block_tokens` holds without its column.

    `hash_ids` holds one id per prompt block (a list; in CSV numbers separated by spaces), named with its prefix.
    """
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    arrival_s = rows.seconds(columns.arrival) / columns.units_per_s
    prompt = rows.whole(columns.prompt, minimum=1)
    output = rows.whole(columns.output, minimum=1)
    think_s = rows.seconds("think_s", blank=True) if rows.has("think_s") else np.full(len(prompt), np.nan)
    tenant, tenants = rows.labels("tenant") if rows.has("tenant") else (np.zeros(len(prompt), np.int32), ("default",))
    session = rows.sessions("session") if rows.has("session") else np.full(len(prompt), -1, np.int32)
    if rows.has("block_tokens"):
        stated = rows.whole("block_tokens", minimum=1)
        block_tokens = int(stated[0])
        rows.reject(
            "block_tokens", stated != block_tokens, f"must be the same on every row; the first has {block_tokens}"
        )
    ids, counts = None, None
    if rows.has("hash_ids"):
        if not block_tokens:
            raise TraceError(f"{table.source}: hash_ids without block_tokens; add that column: the tokens of one block")
        ids, counts = rows.block_ids("hash_ids", prompt, block_tokens)
    keep = rows.keep()
    return Trace.from_columns(
        name=name,
        arrival_s=arrival_s[keep],
        prompt_tokens=prompt[keep],
        output_tokens=output[keep],
        tenant=tenant[keep],
        tenants=tenants,
        session=session[keep],
        think_s=think_s[keep],
        block_tokens=block_tokens if ids is not None else 0,
        block_ids=() if ids is None else ids,
        block_counts=counts,
        skipped_rows=rows.skipped_rows,
        notes=ignored_columns_note(table, (*columns.required, *OPTIONAL)),
    )
