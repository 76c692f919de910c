"""The files that a simulation or a comparison leaves in its folder: a summary, tables in Parquet, a report page."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from kvsim.results.documents import FORMATS, REPORTS, write_pages
from kvsim.results.folder import Held, hold
from kvsim.results.identity import IDENTITY, joint_identity
from kvsim.results.perfetto import perfetto_trace
from kvsim.results.summary import SCHEMA_VERSION, Array, Result, latencies, plain, summarize

_SLUG_CHARACTERS = 80  # file systems take 255 bytes
_OF_A_RUN = ("summary.json", "requests.parquet", "series.parquet", "trace.perfetto.json")
_ON_TOP = (*_OF_A_RUN, *REPORTS)


class Page(Protocol):
    """What makes the page about some results."""

    def __call__(
        self,
        results: Sequence[Result],
        *,
        slo: Mapping[str, float] | None,
        warmup_s: float,
        identity: Mapping[str, str],
        missing: Sequence[str],
    ) -> str: ...


@contextmanager
def holding(out: Path, policies: Sequence[str] = (), formats: Sequence[str] = FORMATS[:1]) -> Iterator[Held]:
    """The folder `out`, ready for the results of these policies before a long run, as `hold` has it."""
    with hold(out, _earlier, [*_names(policies), *(f"report.{name}" for name in formats)]) as folder:
        yield folder


def write_set(
    results: Sequence[Result],
    folder: Held,
    pages: Mapping[str, Page],
    *,
    missing: Sequence[str] = (),
    slo: Mapping[str, float] | None = None,
    warmup_s: float = 0,
) -> None:
    """Write the results, with the statistics of `summarize`, into a folder that is held.

    One result gives `summary.json`, `requests.parquet`, `series.parquet`, `trace.perfetto.json` and the reports that
    `pages` make, by their formats. Several give one of each report, a `summary.json` whose `runs` are their summaries,
    and the others in a folder for each run, named by its policy. They take the place of earlier results as one set, or
    not at all. `missing` are the policies that an interruption left no time. Raises ValueError as `summarize` does and
    for no results at all, OSError when they cannot be written.
    """
    if not results:
        raise ValueError("there are 0 results to write; a report needs at least 1")
    summaries = [summarize(result, slo, warmup_s) for result in results]
    several = len(results) + len(missing) > 1
    summary = comparison(summaries, missing) if several else summaries[0]

    def fill(new: Path) -> None:
        if several:
            for result, own, slug in zip(results, summaries, _slugs([_policy(own) for own in summaries]), strict=True):
                (new / slug).mkdir()
                _write_run(result, own, new / slug)
            _write_json(summary, new / "summary.json")
        else:
            _write_run(results[0], summary, new)
        asked: dict[str, Any] = {"slo": slo, "warmup_s": warmup_s, "identity": _identity(summary), "missing": missing}
        write_pages({name: page(results, **asked) for name, page in pages.items()}, new)

    folder.replace(fill)


def comparison(summaries: Sequence[Mapping[str, Any]], missing: Sequence[str] = ()) -> dict[str, Any]:
    """The summary of several runs: whose it is, whether it is partial, which policies are missing, and each run's."""
    partial = bool(missing) or any(run["partial"] for run in summaries)
    own = joint_identity(summaries, list(missing))
    return {
        "schema_version": SCHEMA_VERSION,
        **own,
        "partial": partial,
        "missing": list(missing),
        "runs": list(summaries),
    }


def _write_run(result: Result, summary: Mapping[str, Any], folder: Path) -> None:
    own = _identity(summary)
    _write_parquet({**result.requests, **latencies(result)}, own, folder / "requests.parquet")
    _write_parquet(result.series, own, folder / "series.parquet")
    _write_json(summary, folder / "summary.json")
    trace = perfetto_trace(result)
    trace["otherData"] |= own
    _write_json(trace, folder / "trace.perfetto.json", indent=None)


def _write_json(document: Mapping[str, Any], path: Path, indent: int | None = 2) -> None:
    try:
        text = json.dumps(document, indent=indent, allow_nan=False)
    except ValueError:  # what is no number is null, here as in the tables
        text = json.dumps(plain(document), indent=indent, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _write_parquet(columns: Mapping[str, Array], own: Mapping[str, str], path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    # from_pandas turns NaN, where something did not happen, into null.
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
    parquet.write_table(table.replace_schema_metadata(own), path)


def _identity(summary: Mapping[str, Any]) -> dict[str, str]:
    return {name: summary[name] for name in IDENTITY}


def _policy(summary: Mapping[str, Any]) -> str:
    return str(summary["inputs"]["policy"])


def _names(policies: Sequence[str]) -> list[str]:
    """The files of a set of such runs."""
    return list(_OF_A_RUN) if len(policies) < 2 else _of_several(policies)


def _of_several(policies: Sequence[str]) -> list[str]:
    return ["summary.json", *(f"{slug}/{name}" for slug in _slugs(policies) for name in _OF_A_RUN)]


def _earlier(out: Path) -> list[str]:
    """The files of the set whose `summary.json` stands in a folder; none where that is no summary of ours."""
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        if "runs" in summary:
            names = {*_ON_TOP, *_of_several([_policy(run) for run in summary["runs"]])}
        else:
            names = set(_ON_TOP) if _policy(summary) and summary["schema_version"] else set()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return sorted(name for name in names if (out / name).is_file() or (out / name).is_symlink())


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
