"""Traces of LLMServingSim (Cho et al., IISWC 2024): arrivals in nanoseconds, lengths, and the tokens themselves.

Format: casys-kaist/LLMServingSim, `dataset/example_trace.jsonl` at commit 9e3f0ece (2025).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from traces.checks import Rows, ignored_columns_note
from traces.schema import Trace, TraceError
from traces.table import Table
from traces.tabular import checked_block, finish
from traces.units import seconds

COLUMNS = ("arrival_time_ns", "input_toks", "output_toks")
TOKENS = "input_tok_ids"
SESSION = "session_id"
UNREAD = ("output_tok_ids", "hash_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`block_tokens` above 0 names the prompts' full blocks of so many tokens by what is in them and before them."""

    block_tokens: int = 0

    def __post_init__(self) -> None:
        checked_block(self.block_tokens)


def load(table: Table, options: Options, *, name: str, skip_bad_rows: bool = False) -> Trace:
    """The trace of a table with LLMServingSim's columns."""
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    times_ns = rows.nanoseconds(COLUMNS[0])
    prompt, output = (rows.whole(field, minimum=1) for field in COLUMNS[1:])
    if rows.has(TOKENS):
        held = np.array([len(cell) if isinstance(cell, list | np.ndarray) else -1 for cell in table.columns[TOKENS]])
        rows.reject(TOKENS, (held >= 0) & (held != prompt), f"must list as many tokens as {COLUMNS[1]} says")
    good = rows.keep()
    first_ns = int(times_ns[good].min())
    start_ns = first_ns if first_ns >= 10**17 else 0  # of a clock since 1970
    _, notes = seconds(np.array([float(first_ns)]), "ns")
    if options.block_tokens:
        if not rows.has(TOKENS):
            raise TraceError(f"{table.source}: block_tokens={options.block_tokens}: it lists no {TOKENS} to name")
        lists = [cell.tolist() if isinstance(cell, np.ndarray) else cell for cell in table.columns[TOKENS]]
        bad = np.array([not isinstance(cell, list) or set(map(type, cell)) > {int} for cell in lists])
        rows.reject(TOKENS, bad, "must list the prompt's tokens as whole numbers, so that its blocks can be named")
        rows.keep()
        table.columns["hash_ids"] = _named(lists, bad, options.block_tokens)
    elif rows.has(TOKENS):
        notes = (*notes, f"prefixes are not read; the option block_tokens=16 names blocks by their {TOKENS}")
    return finish(
        rows,
        name=name,
        arrival_s=(times_ns - start_ns) / 1e9,
        prompt=prompt,
        output=output,
        session=rows.sessions(SESSION) if rows.has(SESSION) else None,
        stated=options.block_tokens,
        notes=(*notes, *ignored_columns_note(table, (*COLUMNS, TOKENS, SESSION, *UNREAD))),
    )


def _named(lists: list[Any], bad: Any, size: int) -> list[list[int]]:
    """For each prompt the numbers of its full blocks: equal where the tokens up to a block's end are."""
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    named = []
    for tokens, wrong in zip(lists, bad, strict=True):
        ids: list[int] = []
        before = -1
        for start in range(0, 0 if wrong else len(tokens) - size + 1, size):
            before = known.setdefault((before, tuple(tokens[start : start + size])), len(known))
            ids.append(before)
        named.append(ids)
    return named
