"""Writes a trace as JSON lines, CSV (each also gzipped) or Parquet, so that reading it back loses no request data."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import IO, Any

import numpy as np

from traces import mooncake, tabular
from traces.blocks import block_tokens_of, with_tail
from traces.replacing import replacing
from traces.schema import Floats, Trace, TraceError
from traces.table import SUFFIXES
from traces.units import EPOCH_S, UNITS_PER_S, milliseconds_or_ask


def write(trace: Trace, path: str | Path, *, overwrite: bool = False) -> None:
    """Write the trace to a path ending in .jsonl, .csv (or either with .gz) or .parquet, whole or not at all.

    JSON lines take Mooncake's column names when every arrival is a whole number of milliseconds that no reader can
    take for another unit, so that a Mooncake trace comes back byte for byte; otherwise all formats have the columns of
    `traces.tabular`. Columns without content are left out. Raises TraceError for another ending, and for an existing
    file unless `overwrite`.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise TraceError(f"{path}: unknown file type; use one of {', '.join(SUFFIXES)}")
    if path.exists() and not overwrite:
        raise TraceError(f"{path}: exists already; choose another name, or say overwrite")
    with replacing(path) as stream:
        if path.suffix == ".parquet":
            _write_parquet(trace, stream)
        elif path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as packed:
                _write_text(trace, packed, path.suffixes[-2])
        else:
            _write_text(trace, stream, path.suffix)


def _write_text(trace: Trace, stream: Any, suffix: str) -> None:
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    try:
        if suffix == ".csv":
            _write_csv(trace, text)
        else:
            _write_jsonl(trace, text)
    finally:
        text.detach()  # writes what is left, and leaves the stream to whoever opened it


def _write_csv(trace: Trace, text: io.TextIOWrapper) -> None:
    columns = _columns(trace, tabular.PLAIN)
    if "hash_ids" in columns:
        columns["hash_ids"] = (" ".join(map(str, ids.tolist())) for ids in columns["hash_ids"])
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))


def _write_jsonl(trace: Trace, text: io.TextIOWrapper) -> None:
    milliseconds = _milliseconds(trace)
    if milliseconds is None:
        columns = _columns(trace, tabular.PLAIN)
    else:
        columns = _columns(trace, mooncake.COLUMNS)
        columns["timestamp"] = milliseconds.astype(np.int64).tolist()
        if trace.block_tokens and _is_mooncake_block(trace):
            del columns["block_tokens"]
    if "hash_ids" in columns:
        columns["hash_ids"] = (ids.tolist() for ids in columns["hash_ids"])
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    text.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _milliseconds(trace: Trace) -> Floats | None:
    """Arrivals in milliseconds, when they are whole and the reader of Mooncake's columns is certain of their unit."""
    per_s = UNITS_PER_S[mooncake.COLUMNS.unit]
    milliseconds = np.round(trace.arrival_s * per_s)
    if not (milliseconds / per_s == trace.arrival_s).all() or milliseconds[-1] >= EPOCH_S * per_s:
        return None
    try:
        milliseconds_or_ask(milliseconds, trace.name, mooncake.COLUMNS.arrival)
    except TraceError:
        return None
    return milliseconds


def _is_mooncake_block(trace: Trace) -> bool:
    """Whether the reader of Mooncake's columns finds the trace's own block from the numbers of ids alone."""
    counts = np.diff(trace.block_offsets)
    if (
        trace.block_tokens != mooncake.BLOCK_TOKENS
        or not with_tail(trace.prompt_tokens, counts, trace.block_tokens).all()
    ):
        return False
    try:
        found = block_tokens_of(trace.prompt_tokens, counts, source=trace.name, default=mooncake.BLOCK_TOKENS)
    except TraceError:
        return False
    return found == trace.block_tokens


def _write_parquet(trace: Trace, stream: IO[bytes]) -> None:
    import pyarrow as pa  # heavy, and absent on machines that only need text traces
    import pyarrow.parquet as pq

    columns = _columns(trace, tabular.PLAIN)
    if "hash_ids" in columns:
        columns["hash_ids"] = pa.LargeListArray.from_arrays(trace.block_offsets, trace.block_ids)
    pq.write_table(pa.table(columns), stream, compression="zstd")


def _columns(trace: Trace, names: tabular.Columns) -> dict[str, Any]:
    """The trace's columns under these names, unknown think times as None, block ids as arrays; empty ones left out."""
    columns: dict[str, Any] = {
        names.arrival: trace.arrival_s.tolist(),
        names.prompt: trace.prompt_tokens.tolist(),
        names.output: trace.output_tokens.tolist(),
    }
    if trace.tenants != ("default",):
        columns["tenant"] = [trace.tenants[code] for code in trace.tenant.tolist()]
    if (trace.session >= 0).any():
        columns["session"] = [code if code >= 0 else None for code in trace.session.tolist()]
    if not np.isnan(trace.think_s).all():
        columns["think_s"] = [None if np.isnan(think) else think for think in trace.think_s.tolist()]
    if trace.block_tokens:
        columns["block_tokens"] = [trace.block_tokens] * len(trace)
        columns["hash_ids"] = [trace.blocks(i) for i in range(len(trace))]
    return columns
