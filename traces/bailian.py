"""Qwen-Bailian's usage traces (Wang et al., USENIX ATC 2025): seconds, chats, and one hash per 16-token block.

Format: alibaba-edu/qwen-bailian-usagetraces-anon, `README.md` at commit 03a51e31 (2026). A chat's turns name the chat
before them; the root's is -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from traces.checks import Rows, ignored_columns_note
from traces.mooncake import COLUMNS, FOREIGN
from traces.schema import Codes, Trace
from traces.table import Table
from traces.tabular import OPTIONAL, checked_block, finish
from traces.units import TimeUnit, checked_unit, seconds, seconds_or_ask

BLOCK_TOKENS = 16
REQUIRED = (*COLUMNS.required, "chat_id", "parent_chat_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(TimeUnit):
    """`time_unit` and `block_tokens` contradict the format's own seconds and 16 tokens."""

    block_tokens: int = 0

    def __post_init__(self) -> None:
        checked_unit(self.time_unit)
        checked_block(self.block_tokens)


def load(table: Table, options: Options, *, name: str, skip_bad_rows: bool = False) -> Trace:
    """The trace of a table with Qwen-Bailian's columns: a chat and those that follow it are a session."""
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    times = rows.seconds(COLUMNS.arrival)
    prompt, output = (rows.whole(field, minimum=1) for field in (COLUMNS.prompt, COLUMNS.output))
    chats, parents = (_numbers(rows, field) for field in ("chat_id", "parent_chat_id"))
    good = rows.keep()
    times[~good] = np.nan
    unit = options.time_unit or seconds_or_ask(times[good], table.source, COLUMNS.arrival)
    arrival_s, notes = seconds(times, unit)
    return finish(
        rows,
        name=name,
        arrival_s=arrival_s,
        prompt=prompt,
        output=output,
        session=_sessions(chats, parents),
        stated=options.block_tokens,
        default=BLOCK_TOKENS,
        certain=True,
        notes=(*notes, *ignored_columns_note(table, (*COLUMNS.required, *OPTIONAL, *FOREIGN))),
    )


def _numbers(rows: Rows, field: str) -> list[int]:
    """Whole numbers that name chats; -1 for no chat, and where a row is bad."""
    values = rows.numbers(field)
    with np.errstate(invalid="ignore"):
        good = (values >= -1) & (values < 2**53) & (np.floor(values) == values)
    rows.reject(field, ~good, "must be the whole number of a chat, or -1: none")
    return [int(value) for value in np.where(good, values, -1)]


def _sessions(chats: list[int], parents: list[int]) -> Codes:
    """A session number for each chat and those that follow it, in order of first appearance."""
    parent_of = {chat: parent for chat, parent in zip(chats, parents, strict=True) if chat >= 0}
    root_of: dict[int, int] = {}
    for chat in parent_of:
        path: list[int] = []
        at, seen = chat, set[int]()
        while at not in root_of and at not in seen:
            seen.add(at)
            path.append(at)
            above = parent_of[at]
            if above not in parent_of:  # a root, or the chat before is not in the file
                break
            at = above
        root = root_of.get(at, at)
        root_of |= dict.fromkeys(path, root)
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(root_of[c], len(numbers)) if c >= 0 else -1 for c in chats], np.int32)
