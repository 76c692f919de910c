"""Tables of requests by named columns, the project's own plain one among them, in CSV, JSON lines or Parquet."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from traces.blocks import block_tokens_of
from traces.checks import Rows, ignored_columns_note
from traces.schema import Codes, Floats, Ints, Trace, TraceError
from traces.table import Table
from traces.units import checked_unit, seconds
from traces.untimed import checked_rate, poisson_s

OPTIONAL = ("tenant", "session", "think_s", "block_tokens", "hash_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """What a format calls its three required columns, and the unit of its arrival column."""

    arrival: str = "arrived_at"
    prompt: str = "num_prefill_tokens"
    output: str = "num_decode_tokens"
    unit: str = "s"

    @property
    def required(self) -> tuple[str, str, str]:
        """The three column names."""
        return self.arrival, self.prompt, self.output


PLAIN = Columns()


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """`time_unit` is that of arrivals ("": seconds), `block_tokens` the tokens of a block id (0: as its column says).

    Without that column the numbers of ids must leave one usual size. `rate_rps` draws arrivals for a table of lengths.
    """

    time_unit: str = ""
    block_tokens: int = 0
    rate_rps: float = 0.0

    def __post_init__(self) -> None:
        checked_unit(self.time_unit)
        checked_block(self.block_tokens)
        checked_rate(self.rate_rps)


def checked_block(block_tokens: int) -> int:
    """The tokens of a block, or 0: not stated. Raises TraceError."""
    if not 0 <= block_tokens < 2**31:
        raise TraceError(f"block_tokens={block_tokens}: must be a whole number from 1 to {2**31 - 1:,}")
    return block_tokens


def load(table: Table, options: Options, *, name: str, seed: int = 0, skip_bad_rows: bool = False) -> Trace:
    """A trace of the plain table's columns and whichever of OPTIONAL there are.

    `hash_ids` holds one id per prompt block (a list; in CSV numbers separated by spaces), named with its prefix.
    """
    rows = Rows(table, skip_bad_rows=skip_bad_rows)
    arrival_s = rows.seconds(PLAIN.arrival) if rows.has(PLAIN.arrival) else np.zeros(len(table.lines))
    prompt, output = (rows.whole(field, minimum=1) for field in (PLAIN.prompt, PLAIN.output))
    notes = ignored_columns_note(table, (*PLAIN.required, *OPTIONAL))
    if not rows.has(PLAIN.arrival):
        if options.time_unit:
            raise TraceError(f"{table.source}: time_unit={options.time_unit}: there is no column {PLAIN.arrival}")
        good = rows.keep()
        why = f"{table.source}: no column {PLAIN.arrival}"
        arrival_s[good], drawn = poisson_s(int(good.sum()), options.rate_rps, seed, why)
        notes = (drawn, *notes)
    elif options.rate_rps:
        raise TraceError(f"{table.source}: rate_rps={options.rate_rps:g}: its arrivals are recorded; leave it out")
    else:
        arrival_s[~rows.keep()] = np.nan
        arrival_s, since = seconds(arrival_s, options.time_unit or PLAIN.unit)
        notes = (*since, *notes)
    return finish(
        rows, name=name, arrival_s=arrival_s, prompt=prompt, output=output, stated=options.block_tokens, notes=notes
    )


def finish(
    rows: Rows,
    *,
    name: str,
    arrival_s: Floats,
    prompt: Ints,
    output: Ints,
    session: Codes | None = None,
    think_s: Floats | None = None,
    stated: int = 0,
    default: int = 0,
    certain: bool = False,
    notes: tuple[str, ...] = (),
) -> Trace:
    """The trace of the rows that are good, with whichever of OPTIONAL they have besides.

    `stated` is the size of a block that the user gave; `default` and `certain` are those of `block_tokens_of`.
    """
    if think_s is None:
        think_s = rows.seconds("think_s", blank=True) if rows.has("think_s") else np.full(len(prompt), np.nan)
    tenant, tenants = rows.labels("tenant") if rows.has("tenant") else (np.zeros(len(prompt), np.int32), ("default",))
    if session is None:
        session = rows.sessions("session") if rows.has("session") else np.full(len(prompt), -1, np.int32)
    block_tokens, ids, counts = 0, None, None
    own = _of_column(rows)
    if stated and own and stated != own:
        raise TraceError(f"{rows.table.source}: block_tokens={stated}: its own column says {own}; leave the option out")
    stated = stated or own
    if has_ids(rows):
        lists = rows.id_lists("hash_ids")
        block_tokens = stated
        if not stated:
            good, held = rows.keep(), np.array([len(row) for row in lists])
            block_tokens = block_of(rows, prompt[good], held[good], default, certain=certain)
            if block_tokens != default:
                notes = (*notes, f"hash_ids are of {block_tokens} tokens: their numbers fit no other usual block")
        ids, counts = rows.block_ids("hash_ids", lists, prompt, block_tokens)
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
        notes=notes,
    )


def has_ids(rows: Rows) -> bool:
    """Whether any row has block ids; exporters without hashes write null in all."""
    return rows.has("hash_ids") and any(cell is not None for cell in rows.table.columns["hash_ids"])


def block_of(rows: Rows, prompt: Ints, counts: Ints, default: int, *, certain: bool = False) -> int:
    """The tokens of a block: those of its column, or those that the good rows' lengths and numbers of ids tell."""
    own = _of_column(rows)
    return own or block_tokens_of(prompt, counts, source=rows.table.source, default=default, certain=certain)


def _of_column(rows: Rows) -> int:
    """What the column block_tokens says, 0 without one; rows that say something else are bad."""
    if not rows.has("block_tokens"):
        return 0
    column = rows.whole("block_tokens", minimum=1)
    first = int(column[0])
    rows.reject("block_tokens", column != first, f"must be the same on every row; the first has {first}")
    return first
