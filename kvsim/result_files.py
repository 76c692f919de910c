"""The files that a simulation or a comparison leaves in its folder: a summary, tables in Parquet, a report page."""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvsim.perfetto import perfetto_trace
from kvsim.report import report_html
from kvsim.results import SCHEMA_VERSION, Array, Result, latencies, summarize

_SLUG_CHARACTERS = 80  # file systems take 255 bytes


def prepare(out: Path) -> None:
    """Make the folder `out` and see that files can be made in it, so that a long run does not end in an error.

    Raises ValueError when `out` is a file, lies below one, or takes no files.
    """
    blocking = next((path for path in (out, *out.parents) if path.exists()), None)
    if blocking is not None and not blocking.is_dir():
        raise ValueError(f"{blocking} is a file; results need a folder, so choose another name for it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"{out}: {error.strerror}; results need a folder that takes files") from None


def write(results: Sequence[Result], out: Path, *, slo: Mapping[str, float] | None = None, warmup_s: float = 0) -> None:
    """Write the results, with the statistics of `summarize`, into the folder `out`, which is made when missing.

    One result gives `summary.json`, `requests.parquet`, `series.parquet`, `trace.perfetto.json` and `report.html`.
    Several give one `report.html`, a `summary.json` whose `runs` are their summaries, and the others in a folder for
    each run, named by its policy. Each file appears whole or not at all. Raises ValueError as `prepare` and `summarize`
    do.
    """
    if not results:
        raise ValueError("there are 0 results to write; a report needs at least 1")
    prepare(out)
    summaries = [summarize(result, slo, warmup_s) for result in results]
    if len(results) == 1:
        _write_run(results[0], summaries[0], out)
    else:
        slugs = _slugs([str(result.inputs["policy"]) for result in results])
        for result, summary, slug in zip(results, summaries, slugs, strict=True):
            (out / slug).mkdir(exist_ok=True)
            _write_run(result, summary, out / slug)
        _write_json({"schema_version": SCHEMA_VERSION, "runs": summaries}, out / "summary.json")
    with _replacing(out / "report.html") as path:
        path.write_text(report_html(results, slo=slo, warmup_s=warmup_s), encoding="utf-8")


def _write_run(result: Result, summary: Mapping[str, Any], folder: Path) -> None:
    _write_parquet({**result.requests, **latencies(result)}, folder / "requests.parquet")
    _write_parquet(result.series, folder / "series.parquet")
    _write_json(summary, folder / "summary.json")
    with _replacing(folder / "trace.perfetto.json") as temporary:
        temporary.write_text(json.dumps(perfetto_trace(result), allow_nan=False), encoding="utf-8")


def _write_json(document: Mapping[str, Any], path: Path) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_parquet(columns: Mapping[str, Array], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    # from_pandas turns NaN, where something did not happen, into null.
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
    with _replacing(path) as temporary:
        parquet.write_table(table, temporary)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of `path` to write to, which takes its place when all went well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _slugs(texts: Sequence[str]) -> list[str]:
    """A folder name for each text, safe on any file system; equal ones (in any case) are numbered."""
    slugs: list[str] = []
    for text in texts:
        base = re.sub(r"[^A-Za-z0-9._=-]+", "-", text)[:_SLUG_CHARACTERS].strip("-.") or "run"
        slug, number = base, 1
        while slug.casefold() in map(str.casefold, slugs):
            number += 1
            slug = f"{base}-{number}"
        slugs.append(slug)
    return slugs
