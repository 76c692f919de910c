"""Folders that hold a JSON document of ours, a page about it and other files: which of them are an earlier set."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

FORMATS = ("html", "md", "json", "csv")
"""What a page can be written as, the default first."""

REPORTS = tuple(f"report.{name}" for name in FORMATS)
PLAN = "plan.json"


def earlier_set(out: Path, document: str, names: Sequence[str], rows: str) -> list[str]:
    """Of `document`, `names` and pages what a folder holds; none where the document is none of ours, with `rows`."""
    try:
        held = json.loads((out / document).read_text(encoding="utf-8"))
        ours = bool(held["schema_version"]) and isinstance(held[rows], list)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in (document, *names, *REPORTS) if ours and (out / name).is_file()]


def earlier_plan(out: Path) -> list[str]:
    """The files of a plan that a folder holds."""
    return earlier_set(out, PLAN, (), "plans")


def write_pages(pages: Mapping[str, str], folder: Path) -> None:
    """Write a page in each of its formats; characters that UTF-8 has not, as of names of files, are escaped."""
    for name, text in pages.items():
        (folder / f"report.{name}").write_bytes(text.encode("utf-8", "backslashreplace"))
