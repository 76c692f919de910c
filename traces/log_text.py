"""Lines of a server's log: opening it, and taking the clients' text out of a line before anything is read from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from traces.archive import whole_file
from traces.table import open_text

QUOTED = r"""'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*\""""
_QUOTED = re.compile(rf"{QUOTED}|['\"].*", re.DOTALL)  # a line that was cut may end inside a string
_WORD = re.compile(r"(['\"])[\w.:-]{1,80}\1")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def is_log(path: Path) -> bool:
    """Whether the name is that of a log: `.log`, also gzipped, also with a rotation's suffix (`.log.2026-05-20_08`)."""
    return ".log" in path.suffixes


def log_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line without terminal colours), one at a time; bytes that are not UTF-8 are replaced."""
    with whole_file(path), open_text(path, errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            yield number, _COLOUR.sub("", line) if "\x1b" in line else line


def without_text(message: str) -> str:
    """The message with its quoted strings emptied, except bare words: a prompt can neither be kept nor be mistaken."""
    return _QUOTED.sub(lambda quoted: quoted[0] if _WORD.fullmatch(quoted[0]) else "''", message)


def clock_s(text: str | None) -> float:
    """Seconds since 1970 by the clock, without zone, that wrote the text; NaN when it is no date and time."""
    try:
        return float(np.datetime64(text, "us").astype(np.int64)) / 1e6 if text else np.nan
    except ValueError:
        return np.nan


def cell(value: object) -> str | None:
    """A value as the text cell of a table; None stays None."""
    return None if value is None else str(value)
