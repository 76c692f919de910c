"""Everything that results leave in a folder: their files, and the page about them."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kvsim.report.formats import in_format
from kvsim.report.report import report_contents, report_html
from kvsim.results.documents import FORMATS
from kvsim.results.files import holding, write_set
from kvsim.results.folder import Held
from kvsim.results.summary import Result


def write_results(
    results: Sequence[Result],
    out: Path,
    *,
    formats: Sequence[str] = FORMATS[:1],
    slo: Mapping[str, float] | None = None,
    warmup_s: float = 0,
) -> None:
    """Write all files of the results, with the statistics of `summarize`, into `out`, which is made when missing.

    `formats` are those of the report: `html`, `md`, `json`, `csv`. Raises ValueError as `write_set` does and for a
    folder of something else, OSError when they cannot be written.
    """
    with holding(out, [str(result.inputs["policy"]) for result in results], formats) as folder:
        write_held(results, folder, formats=formats, slo=slo, warmup_s=warmup_s)


def write_held(
    results: Sequence[Result],
    folder: Held,
    *,
    formats: Sequence[str] = FORMATS[:1],
    missing: Sequence[str] = (),
    slo: Mapping[str, float] | None = None,
    warmup_s: float = 0,
) -> None:
    """As `write_results`, into a folder held already; `missing` are the policies that an interruption left no time."""
    pages = {name: report_html if name == "html" else partial(_report, name) for name in formats}
    write_set(results, folder, pages, missing=missing, slo=slo, warmup_s=warmup_s)


def _report(name: str, results: Sequence[Result], **asked: Any) -> str:
    return in_format(report_contents(results, **asked), name)
