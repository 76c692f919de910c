"""Mooncake's request traces (Qin et al., FAST 2025), and the traces of NVIDIA Dynamo and AIPerf in their columns.

Mooncake: arrivals in whole milliseconds, lengths, and one prefix hash per 512-token block, a partial last one included.
Dynamo and AIPerf have other blocks (64 tokens from Dynamo's tools), and sessions whose later turns come `delay` (or
`delay_ms`) milliseconds after the answer before: ai-dynamo/aiperf, `docs/benchmark-modes/trace-replay.md` at 0109a64e
(2026); docs.rs, `dynamo-data-gen` 1.4, `MooncakeRow`, whose other names for these columns are read as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from traces import tabular
from traces.arrivals import spread
from traces.checks import Rows, ignored_columns_note
from traces.deltas import are_deltas, checked_turns, turns_before, whole
from traces.schema import Codes, Floats, Ints, Trace, TraceError
from traces.table import Table
from traces.tabular import OPTIONAL, Columns, finish
from traces.units import UNITS_PER_S, ask, milliseconds_or_ask, seconds
from traces.untimed import poisson_s

COLUMNS = Columns(arrival="timestamp", prompt="input_length", output="output_length", unit="ms")
BLOCK_TOKENS = 512
ALIASES = {
    "created_time": "timestamp",
    "input_tokens": "input_length",
    "output_tokens": "output_length",
    "session_id": "session",
    "delay_ms": "delay",
}
FOREIGN = ("chat_id", "parent_chat_id", "turn")  # of Qwen-Bailian's traces, whose times are in seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(tabular.Options):
    """How to read what the columns do not say for certain.

    `time_unit` and `block_tokens` say the unit of the times (also of `delay`, not of `delay_ms`) and the tokens of a
    block id; `rate_rps` draws arrivals for a trace without timestamps. `spread_s` moves every arrival later by a
    uniform draw from [0, spread_s): the conversation trace records arrivals in ticks of about 3 s, and 3 spreads the
    requests of a tick over it. `turns` says whether those of a session hold the `whole` prompt or a `delta`.
    """

    spread_s: float = 0.0
    turns: str = ""

    def __post_init__(self) -> None:
        tabular.Options.__post_init__(self)
        checked_turns(self.turns)


def is_mooncake(columns: set[str]) -> bool:
    """Whether these are Mooncake's columns, under any of their names; under its own the timestamp may be missing."""
    known = {ALIASES.get(name, name) for name in columns}
    own = {COLUMNS.prompt, COLUMNS.output} <= columns
    return set(COLUMNS.required) <= known or own


def load(table: Table, options: Options, *, name: str, seed: int = 0, skip_bad_rows: bool = False) -> Trace:
    """The trace of a table with Mooncake's columns; raises TraceError where unit or block are not certain."""
    renamed = [alias for alias in ALIASES if alias in table.columns]
    for alias in renamed:
        if ALIASES[alias] in table.columns:
            raise TraceError(f"{table.source}: columns {alias} and {ALIASES[alias]} are one; keep one of them")
        table.columns[ALIASES[alias]] = table.columns.pop(alias)
        table.written[ALIASES[alias]] = alias
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    session = rows.sessions("session") if rows.has("session") else np.full(len(table.lines), -1, np.int32)
    first = _first_turns(session)
    turns = rows.has("delay")
    delay = rows.seconds("delay", blank=True) if turns else np.full(len(session), np.nan)
    times = rows.seconds("timestamp", blank=turns) if rows.has("timestamp") else np.full(len(session), np.nan)
    if turns and rows.has("timestamp"):
        rule = "must be known for the first turn of a session, and for a later one that has no delay"
        rows.reject("timestamp", np.isnan(times) & (first | np.isnan(delay)), rule)
    prompt, output = (rows.whole(field, minimum=1) for field in (COLUMNS.prompt, COLUMNS.output))
    if turns and rows.has("think_s"):
        raise TraceError(f"{table.source}: columns delay and think_s are one; keep one of them")
    good = rows.keep()
    times[~good] = np.nan
    unit = options.time_unit or _unit(times[good], rows, renamed)
    if options.time_unit and not rows.has("timestamp") and not turns:
        raise TraceError(f"{table.source}: time_unit={unit}: there is no column timestamp; leave it out")
    arrival_s, notes = seconds(times, unit)
    # A column named for its unit keeps it.
    think_s = delay / UNITS_PER_S["ms" if "delay_ms" in renamed or not options.time_unit else unit]
    think_s[first] = np.nan
    if not rows.has("timestamp"):
        later = ~first if turns else np.zeros(len(session), np.bool_)
        drawn_s, note = poisson_s(int((~later).sum()), options.rate_rps, seed, f"{table.source}: no column timestamp")
        arrival_s[~later], notes = drawn_s, (*notes, note)
    elif options.rate_rps:
        raise TraceError(f"{table.source}: rate_rps={options.rate_rps:g}: its arrivals are recorded; leave it out")
    unknown = np.isnan(arrival_s) & good
    if unknown.any():
        _follow(arrival_s, session, think_s)
        placed = f"{int(unknown.sum())} later turns have a delay and no timestamp: placed as if answers took no time"
        notes = (*notes, f"{placed}; replay them with --sessions closed, which waits for the answers")
        rule = "must be known for a later turn, and follow a turn of its session that is good"
        rows.reject("delay", np.isnan(arrival_s), rule)
    stated = options.block_tokens
    if turns or "session_id" in renamed:
        prompt, stated, told = _whole_prompts(rows, prompt, output, session, options)
        notes = (*notes, *told)
    elif options.turns:
        raise TraceError(f"{table.source}: turns={options.turns}: there is no column session_id or delay; leave it out")
    trace = finish(
        rows,
        name=name,
        arrival_s=arrival_s,
        prompt=prompt,
        output=output,
        session=session,
        think_s=think_s if turns else None,
        stated=stated,
        default=BLOCK_TOKENS,
        notes=(*notes, *ignored_columns_note(table, (*COLUMNS.required, *OPTIONAL, "delay"))),
    )
    return spread(trace, options.spread_s, seed)


def _whole_prompts(
    rows: Rows, prompt: Ints, output: Ints, session: Codes, options: Options
) -> tuple[Ints, int, tuple[str, ...]]:
    """(lengths of whole prompts, the block that is certain by now or 0, notes); ids of deltas become whole as well."""
    rows.keep()
    before, has_ids, block_tokens = turns_before(session), tabular.has_ids(rows), options.block_tokens
    ids = rows.id_lists("hash_ids") if has_ids else []
    if options.turns == "whole" or not (options.turns or are_deltas(rows, prompt, output, ids, before)):
        return prompt, block_tokens, ()
    note = "turns of sessions hold only what is new: prompts are that and all turns and answers before"
    if has_ids:
        good, counts = rows.keep(), np.array([len(row) for row in ids])
        block_tokens = block_tokens or tabular.block_of(rows, prompt[good], counts[good], BLOCK_TOKENS)
        rows.block_ids("hash_ids", ids, prompt, block_tokens)
        note = f"{note}; hash_ids are of {block_tokens} tokens"
    lengths = whole(rows, COLUMNS.prompt, prompt, output, before, ids, block_tokens if has_ids else 0)
    if has_ids:
        rows.table.columns["hash_ids"] = ids
    return lengths, block_tokens, (note,)


def _unit(times: Floats, rows: Rows, renamed: list[str]) -> str:
    """The unit that Mooncake's columns are in, unless others beside them, or the figures, speak against it."""
    others = [field for field in FOREIGN if rows.has(field)]
    if others and np.isfinite(times).any():
        why = f"stands beside {', '.join(others)}, which traces in seconds have"
        raise ask(rows.table.source, "timestamp", float(np.nanmax(times)), why)
    if {"input_tokens", "created_time"} & set(renamed) and not rows.has("delay") and np.isfinite(times).any():
        raise ask(rows.table.source, "timestamp", float(np.nanmax(times)), "stands in no known format's columns")
    return milliseconds_or_ask(times, rows.table.source, "timestamp")


def _first_turns(session: Codes) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which rows are the first of their session in the file, or of no session."""
    first = session < 0
    first[np.unique(session, return_index=True)[1]] = True
    return first


def _follow(arrival_s: Floats, session: Codes, think_s: Floats) -> None:
    """Place turns of unknown arrival their delay after the turn before, in order of the file."""
    latest: dict[int, float] = {}
    for i, whose in enumerate(session.tolist()):
        if np.isnan(arrival_s[i]) and whose >= 0:
            arrival_s[i] = latest.get(whose, np.nan) + think_s[i]
        latest[whose] = float(arrival_s[i])
