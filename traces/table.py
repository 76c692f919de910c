"""Reads a CSV, JSON-lines, JSON or Parquet file (text also gzipped) into named columns that remember their lines."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from traces.archive import whole_file
from traces.files import check_regular, open_packed
from traces.schema import TraceError

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
READ_ONLY = (".json", ".json.gz")
_MAX_CELL_CHARS = 1 << 30
UNPACKED_ROWS, ROWS_PER_BYTE = 1_000_000, 16
"""The rows that any Parquet file may have, and those for each of its bytes beyond: one value over and over takes no
room, so that a small file could fill memory; requests take bytes each."""
_SPACE = re.compile(r"\s*")
NESTED = ("resourceSpans", "resource_spans", "attributes", "metadata", "metrics", "error", "benchmarks")
LONGEST_TEXT = 2000  # more than any name may have


@dataclass(kw_only=True, slots=True)
class Table:
    """Cells by column, as the file has them: text (CSV), JSON values or Parquet values; None where a row has no cell.

    `lines` holds each row's line (CSV, JSON lines; the last one of a quoted cell) or row number from 1 (Parquet);
    `written` says how the file calls a column that has another name here.
    """

    source: str
    is_text: bool = False
    columns: dict[str, list[Any]] = field(default_factory=dict)
    lines: list[int] = field(default_factory=list)
    skipped_rows: int = 0
    written: dict[str, str] = field(default_factory=dict)


def read_table(path: Path, *, skip_bad_rows: bool = False) -> Table:
    """The columns of the file; raises TraceError for a broken file, or row unless those are skipped and counted."""
    if not path.name.endswith((*SUFFIXES, *READ_ONLY)):
        raise TraceError(f"{path}: unknown file type; use one of {', '.join((*SUFFIXES, *READ_ONLY))}, or .log")
    if path.suffix == ".parquet":
        table = _read_parquet(path)
    else:
        with whole_file(path), open_text(path) as lines:
            read = _read_csv if ".csv" in path.suffixes else _read_json if ".json" in path.suffixes else _read_jsonl
            table = read(lines, str(path), skip_bad_rows)
    if not table.lines:
        raise TraceError(f"{path}: empty trace: no rows were read ({table.skipped_rows} skipped); needs at least one")
    return table


def open_text(path: Path, errors: str = "strict") -> TextIO:
    """The text of a file, gzipped or not; `errors` as for `open`."""
    return io.TextIOWrapper(open_packed(path), encoding="utf-8-sig", errors=errors, newline="")


def _read_csv(lines: TextIO, source: str, skip_bad_rows: bool) -> Table:
    table = Table(source=source, is_text=True)
    former_limit = csv.field_size_limit(_MAX_CELL_CHARS)  # block ids of one long prompt pass csv's 128 KiB
    try:
        reader = csv.reader(lines, strict=True)
        header = [name.strip() for name in next(reader, [])]
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise TraceError.at(source, 1, "header", ",".join(repeated), "column given twice; keep one")
        rows = []
        for row in reader:
            if len(row) == len(header):
                rows.append(row)
                table.lines.append(reader.line_num)
            elif row and skip_bad_rows:
                table.skipped_rows += 1
            elif row:
                rule = f"must have the header's {len(header)} cells; complete the row or skip bad rows"
                raise TraceError.at(source, reader.line_num, "cells", len(row), rule)
        table.columns = {name: list(cells) for name, cells in zip(header, zip(*rows, strict=True), strict=False)}
    except csv.Error as error:
        raise TraceError(f"{source}:{reader.line_num}: not CSV: {error}; complete or correct it") from error
    finally:
        csv.field_size_limit(former_limit)
    return table


def _read_jsonl(lines: TextIO, source: str, skip_bad_rows: bool) -> Table:
    table, rows = Table(source=source), []
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            row, fault = json.loads(line, object_pairs_hook=_once), "it is another JSON value"
        except (ValueError, RecursionError) as error:
            row, fault = None, _fault(error)
        if not isinstance(row, dict):
            if not skip_bad_rows:
                raise TraceError.at(source, number, "row", line.strip(), f"must be a JSON object; {fault}")
            table.skipped_rows += 1
            continue
        rows.append(condensed(row))
        table.lines.append(number)
    table.columns = _by_column(rows)
    return table


def _read_json(lines: TextIO, source: str, _skip_bad_rows: bool) -> Table:
    """JSON objects one after another, or in one list, each over as many lines as it likes."""
    table, rows = Table(source=source), []
    for number, row, listed in _json_values(lines.read(), source):
        if not isinstance(row, dict):
            kind, rule = (
                "list" if listed else _KINDS[type(row)],
                "must be JSON objects, one after another or in a list",
            )
            raise TraceError.at(source, number, "file", kind, rule)
        rows.append(condensed(row))
        table.lines.append(number)
    table.columns = _by_column(rows)
    return table


def _json_values(text: str, source: str) -> Iterator[tuple[int, Any, bool]]:
    """(line, value, False) of each value of a text; (line, element, True) of each element where a value is a list."""
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    at, number, counted, inside, due = 0, 1, 0, False, False
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing as well
        number, counted = number + text.count("\n", counted, at), at
        mark = text[at : at + 1]
        if not mark and not inside:
            return
        if not inside and mark == "[":
            inside, due, at = True, False, at + 1
        elif inside and mark == "]":
            inside, at = False, at + 1
        elif inside and due and mark == ",":
            due, at = False, at + 1
        elif inside and due:
            raise TraceError.at(source, number, "file", "malformed", "must be JSON; a list goes on without a comma")
        else:
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                raise TraceError.at(
                    source, number, "file", "malformed", f"must be JSON objects; {_fault(error)}"
                ) from error
            yield number, value, inside
            due = True


_KINDS = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "a text", list: "a list"}


def _fault(error: Exception) -> str:
    """What is wrong with a JSON text, in words that need no knowledge of Python."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if not isinstance(error, json.JSONDecodeError) and "digits" in str(error):
        return f"a number has more than the {sys.get_int_max_str_digits():,} digits that are read; shorten it"
    return str(error)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these keys and values; ValueError where a key stands twice, of which JSON would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:80]!r} is given twice; keep one")
    return found


def condensed(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what nobody reads and memory would be full of: chat texts, of which their numbers of characters
    stay, and in spans, records and reports the texts of requests and the lists of their tokens' latencies."""
    turns = row.get("conversations")
    if isinstance(turns, list):
        return {"id": row.get("id"), "conversations": [_turn(turn) for turn in turns]}
    return {key: _short(value) if key in NESTED else value for key, value in row.items()}


def _turn(turn: Any) -> dict[str, Any] | None:
    if not isinstance(turn, dict):
        return None
    text = turn.get("value", turn.get("content"))
    return {"from": turn.get("from", turn.get("role")), "chars": len(text) if isinstance(text, str) else None}


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value[:LONGEST_TEXT]
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [] if value and type(value[0]) in (int, float) else [_short(inner) for inner in value]
    return value


def _by_column(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_parquet(path: Path) -> Table:
    import pyarrow as pa  # heavy, and absent on machines that only need text traces

    table = _decoded(path)
    pa.default_memory_pool().release_unused()  # what decoding a large file took, which nothing else would take back
    return table


def _decoded(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_regular(path)
    most_rows = UNPACKED_ROWS + ROWS_PER_BYTE * path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows > most_rows:
                raise TraceError(f"{path}: {file.metadata.num_rows:,} rows in so small a file; split or correct it")
            stored = file.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path}: not a whole Parquet file ({error}); write it again") from error
    table = Table(source=str(path), lines=list(range(1, stored.num_rows + 1)))
    for name, column in zip(stored.column_names, stored.columns, strict=True):
        if name in table.columns:
            raise TraceError(f"{path}: has the column {name!r} twice; keep one")
        try:
            table.columns[name] = _cells(column)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            reason = error.reason if isinstance(error, UnicodeDecodeError) else error
            rule = f"cannot be read as {column.type} ({reason}); store numbers, text or lists of whole numbers"
            raise TraceError(f"{path}: column {name!r} {rule}") from error
    return table


def _cells(column: Any) -> list[Any]:
    """A Parquet column's cells; those of lists as views into one array."""
    import pyarrow as pa

    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        return list(column.to_pylist())
    # A list of Python integers would take eight times the memory.
    whole = column.combine_chunks()
    values, offsets = whole.values.to_numpy(zero_copy_only=False), whole.offsets.to_numpy()
    return [values[a:b] for a, b in pairwise(offsets)]
