"""Checks a table's cells column by column and keeps the rows that pass: one rule, one message, for every format."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from traces.schema import MAX_TOKENS, Codes, Floats, Ints, TraceError
from traces.table import Table

_INT32_MAX = 2**31 - 1
NAME_CHARACTERS = 1000
COLUMNS_NAMED = 20
_NAME = f"must be text of at most {NAME_CHARACTERS} characters, without lone surrogates, or a number"
_LISTED = re.compile(r"^\s*\[|,|\]\s*$")  # a list as Python and JSON write it


class Rows:
    """The rows of one table under check: columns are read, each noting its bad rows, then `keep` gives the good ones.

    With `skip_bad_rows` bad rows are counted, without it `keep` raises TraceError for the first one.
    """

    def __init__(self, table: Table, *, skip_bad_rows: bool) -> None:
        self.table = table
        self._skip = skip_bad_rows
        self._good = np.ones(len(table.lines), np.bool_)
        self._left_out = np.zeros(len(table.lines), np.bool_)
        self._first: tuple[int, str, str] | None = None

    def has(self, field: str) -> bool:
        """Whether the table has this column."""
        return field in self.table.columns

    def reject(self, field: str, bad: NDArray[np.bool_], rule: str) -> None:
        """Mark rows as bad because their `field` breaks the rule, those aside that are left out."""
        bad = bad & ~self._left_out
        if not bad.any():
            return
        row = int(np.argmax(bad))
        if self._first is None or row < self._first[0]:
            self._first = (row, field, rule)
        self._good &= ~bad

    def leave_out(self, rows: NDArray[np.bool_]) -> None:
        """Leave rows out that are none of the trace's requests, whatever is in them: they count as skipped."""
        self._left_out |= rows
        self._good &= ~rows

    def numbers(self, field: str) -> Floats:
        """The column as float64, NaN where a cell is no number."""
        cells = self.table.columns[field]
        try:
            kinds = set(map(type, cells))
            if kinds <= {int, float} or (self.table.is_text and kinds == {str}):
                return np.asarray(cells).astype(np.float64)
        except (ValueError, OverflowError):
            pass  # some cell is no number: find out which
        return np.array([self._number(cell) for cell in cells])

    def _number(self, cell: object) -> float:
        is_number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
        if not is_number and not (self.table.is_text and isinstance(cell, str)):
            return math.nan
        try:
            return float(cell)  # type: ignore[arg-type]
        except (ValueError, OverflowError):
            return math.nan

    def seconds(self, field: str, *, blank: bool = False) -> Floats:
        """Finite times that are not negative; a blank cell is NaN where that is allowed."""
        values = self.numbers(field)
        bad = ~(np.isfinite(values) & (values >= 0))
        if blank:
            bad &= ~self._blank(field)
        self.reject(field, bad, "must be a finite number that is not negative")
        return values

    def nanoseconds(self, field: str) -> Ints:
        """Whole numbers of nanoseconds, exact; 0 for a row that is bad."""
        cells = self.table.columns[field]
        read = [_whole(cell) if self.table.is_text or not isinstance(cell, str) else None for cell in cells]
        bad = np.array([value is None or not 0 <= value < 2**63 for value in read])
        self.reject(field, bad, "must be a whole number of nanoseconds that is not negative")
        return np.array([0 if wrong else value for value, wrong in zip(read, bad, strict=True)], np.int64)

    def whole(self, field: str, *, minimum: int) -> Ints:
        """Whole numbers of tokens from `minimum` to MAX_TOKENS."""
        values = self.numbers(field)
        with np.errstate(invalid="ignore"):
            good = (values >= minimum) & (values <= MAX_TOKENS) & (np.floor(values) == values)
        self.reject(field, ~good, f"must be a whole number from {minimum} to {MAX_TOKENS:,}; correct or skip the row")
        return np.where(good, values, minimum).astype(np.int64)

    def labels(self, field: str) -> tuple[Codes, tuple[str, ...]]:
        """Names as codes in order of first appearance; a blank cell is named "default"."""
        cells = self._names(field)
        names = [cell or "default" for cell in cells]
        known = {name: code for code, name in enumerate(dict.fromkeys(names))}
        return np.array([known[name] for name in names], np.int32), tuple(known)

    def sessions(self, field: str) -> Codes:
        """Session numbers: whole numbers are kept, other names are numbered by first appearance, blank is -1."""
        cells = self._names(field)
        if all(cell == "" or (cell.isdecimal() and len(cell) <= 10 and int(cell) <= _INT32_MAX) for cell in cells):
            return np.array([int(cell) if cell else -1 for cell in cells], np.int32)
        known = {name: code for code, name in enumerate(name for name in dict.fromkeys(cells) if name)}
        return np.array([known.get(cell, -1) for cell in cells], np.int32)

    def _names(self, field: str) -> list[str]:
        """The column as text, "" where it is blank: also for NaN, which some tools write where there is nothing."""
        cells = self.table.columns[field]
        self.reject(field, np.array([not _is_name(cell) for cell in cells]), _NAME)
        return ["" if cell is None or cell != cell else str(cell) for cell in cells]  # noqa: PLR0124 - NaN alone differs

    def id_lists(self, field: str) -> list[Ints]:
        """Each row's block ids in prompt order, none for a row that cannot be read and is bad."""
        read = [_ids(cell) for cell in self.table.columns[field]]
        unreadable = np.array([ids is None for ids in read])
        self.reject(field, unreadable, "must be whole numbers that are not negative, in prompt order")
        return [np.empty(0, np.int64) if ids is None else ids for ids in read]

    def block_ids(self, field: str, ids: list[Ints], prompt_tokens: Ints, block_tokens: int) -> tuple[Codes, Ints]:
        """(ids of all good rows, ids per row): one id per block of the prompt, the partial last block with or without.

        Check this column last: only rows good so far are kept. Ids that do not fit 32 bits are renumbered from 0.
        """
        counts = np.array([len(row) for row in ids])
        fits = (counts >= prompt_tokens // block_tokens) & (counts <= -(-prompt_tokens // block_tokens))
        rule = f"must have one id for each {block_tokens}-token block of the prompt; correct the row, or say another "
        self.reject(field, ~fits, f"{rule}size with the option block_tokens=N")
        keep = np.flatnonzero(self._good)
        whole = np.uint64 if any(ids[row].dtype == np.uint64 for row in keep) else np.int64
        flat = np.concatenate([np.empty(0, whole), *(ids[row].astype(whole, copy=False) for row in keep)])
        if len(flat) and flat.max() > _INT32_MAX:
            flat = np.unique(flat, return_inverse=True)[1]
        return flat.astype(np.int32), counts[keep]

    def keep(self) -> NDArray[np.bool_]:
        """The good rows; raises TraceError for the first bad one unless bad rows are skipped, and when none is good."""
        if self._first is not None and not self._skip:
            row, field, rule = self._first
            cell, name = self.table.columns[field][row], self.table.written.get(field, field)
            raise TraceError.at(self.table.source, self.table.lines[row], name, cell, rule)
        if not self._good.any():
            left = " or none of its requests" if self._left_out.any() else ""
            rows = f"all {len(self._good)} rows are bad{left} and were skipped; read without skipping to see why"
            raise TraceError(f"{self.table.source}: empty trace: {rows}")
        return self._good

    @property
    def good(self) -> NDArray[np.bool_]:
        """Which rows are good so far."""
        return self._good

    @property
    def skipped_rows(self) -> int:
        """Rows left out so far, unreadable ones included."""
        return self.table.skipped_rows + int(np.count_nonzero(~self._good))

    def _blank(self, field: str) -> NDArray[np.bool_]:
        return np.array([cell is None or cell == "" for cell in self.table.columns[field]])


def _whole(cell: Any) -> int | None:
    if isinstance(cell, str):
        return int(cell) if cell.isdecimal() and len(cell) <= 19 else None
    if type(cell) is float and cell.is_integer() and abs(cell) < 2**53:
        return int(cell)
    return cell if type(cell) is int else None


def ignored_columns_note(table: Table, used: Sequence[str]) -> tuple[str, ...]:
    """A note naming the columns that were not read, if any; of many, the first ones."""
    extra = [name for name in table.columns if name not in used]
    shown = [name[:80].encode(errors="backslashreplace").decode() for name in extra[:COLUMNS_NAMED]]
    more = f" and {len(extra) - COLUMNS_NAMED} more" if len(extra) > COLUMNS_NAMED else ""
    return (f"columns not read: {', '.join(shown)}{more}",) if extra else ()


def _is_name(cell: object) -> bool:
    """Whether a cell can name a tenant or session: nothing, or short text that every file can hold, or a number."""
    return cell is None or (
        isinstance(cell, str | int | float)
        and len(text := str(cell)) <= NAME_CHARACTERS
        and (text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text))
    )


def _ids(cell: Any) -> Ints | None:
    """One row's block ids (JSON list, Parquet array, or text separated by spaces), None when they are not ids.

    Hashes of 64 bits that need the sign's bit are uint64.
    """
    if isinstance(cell, np.ndarray):
        if cell.dtype.kind not in "iu":
            return None
        ids = cell if cell.dtype == np.uint64 and len(cell) and cell.max() >= 2**63 else cell.astype(np.int64)
        return ids if not len(ids) or ids.min() >= 0 else None
    try:
        values = list(map(int, _LISTED.sub(" ", cell).split())) if isinstance(cell, str) else cell
    except ValueError:
        return None
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        return None
    if values and not (min(values) >= 0 and max(values) < 2**64):
        return None
    return np.array(values, np.uint64 if values and max(values) >= 2**63 else np.int64)
