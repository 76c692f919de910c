"""Folders that hold a JSON document of ours, a page about it and other files: which of them are an earlier set."""

import json
from collections.abc import Sequence
from pathlib import Path

REPORT = "report.html"
PLAN_NAMES = ("plan.json", REPORT)


def earlier_set(out: Path, names: Sequence[str], rows: str) -> list[str]:
    """Those of `names` that a folder holds; none where the JSON among them is none of ours, with a list of `rows`."""
    (document,) = (name for name in names if name.endswith(".json"))
    try:
        held = json.loads((out / document).read_text(encoding="utf-8"))
        ours = bool(held["schema_version"]) and isinstance(held[rows], list)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in names if ours and (out / name).is_file()]


def earlier_plan(out: Path) -> list[str]:
    """The files of a plan that a folder holds."""
    return earlier_set(out, PLAN_NAMES, "plans")


def write_page(html: str, folder: Path) -> None:
    """Write a page; characters that UTF-8 has not, as of names of files, are escaped."""
    (folder / REPORT).write_bytes(html.encode("utf-8", "backslashreplace"))
