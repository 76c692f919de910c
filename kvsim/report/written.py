"""Everything that results leave in a folder: their files, and the page about them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvsim.report.report import report_html
from kvsim.results.files import holding, write_set
from kvsim.results.folder import Held
from kvsim.results.summary import Result


def write_results(
    results: Sequence[Result], out: Path, *, slo: Mapping[str, float] | None = None, warmup_s: float = 0
) -> None:
    """Write all files of the results, with the statistics of `summarize`, into `out`, which is made when missing.

    Raises ValueError as `write_set` does and for a folder of something else, OSError when they cannot be written.
    """
    with holding(out, [str(result.inputs["policy"]) for result in results]) as folder:
        write_held(results, folder, slo=slo, warmup_s=warmup_s)


def write_held(
    results: Sequence[Result],
    folder: Held,
    *,
    missing: Sequence[str] = (),
    slo: Mapping[str, float] | None = None,
    warmup_s: float = 0,
) -> None:
    """As `write_results`, into a folder held already; `missing` are the policies that an interruption left no time."""
    write_set(results, folder, report_html, missing=missing, slo=slo, warmup_s=warmup_s)
