"""The files of a sweep: a row for each point in Parquet, the same as JSON with what was asked for, and a page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvsim.results.documents import earlier_set, write_pages
from kvsim.results.row import Value

NAMES = ("sweep.parquet", "sweep.json")


def earlier(out: Path) -> list[str]:
    """The files of a sweep that a folder holds; none where its `sweep.json` is none of ours."""
    return earlier_set(out, "sweep.json", ("sweep.parquet",), "points")


def write_swept(
    document: Mapping[str, Any], rows: Sequence[Mapping[str, Value]], pages: Mapping[str, str], folder: Path
) -> None:
    """Write all into an empty folder: `document` as JSON, whose `points` the rows are made of, and pages by format."""
    import pyarrow as pa
    from pyarrow import parquet

    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: _column([row.get(name) for row in rows]) for name in names})
    parquet.write_table(table, folder / "sweep.parquet")
    text = json.dumps(document, indent=2, allow_nan=False)
    (folder / "sweep.json").write_text(text + "\n", encoding="utf-8")
    write_pages(pages, folder)


def _column(values: Sequence[Value]) -> Any:
    """As numbers where all are, else as text; missing ones are null."""
    import pyarrow as pa

    there = [value for value in values if value is not None]
    if all(isinstance(value, int) for value in there) and there:
        return pa.array(values, pa.bool_() if all(isinstance(value, bool) for value in there) else pa.int64())
    if all(isinstance(value, int | float) for value in there):
        return pa.array(values, pa.float64())
    return pa.array([None if value is None else str(value) for value in values], pa.string())
