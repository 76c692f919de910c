"""What commands print: tables for people, JSON for machines, all of it on standard output."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvsim.text.printable import brief, printable

Columns = Mapping[str, Literal["left", "right"]]
"""How each column is aligned, by its heading."""

SCHEMA_VERSION = 1
if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDTH_IN_A_PIPE = 1000  # no terminal is there to wrap lines for
_LONGEST_CELL, _LONGEST_LINE = 400, 2000  # a text that a trace or file brings may have megabytes

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def print_json(document: Mapping[str, Any]) -> None:
    """Print `document` as `json_text` has it."""
    typer.echo(json_text(document))


def json_text(document: Mapping[str, Any]) -> str:
    """`document` with its `schema_version`; numpy values become plain ones, NaN and infinities null."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **_plain(document)}, indent=2, allow_nan=False)


def print_table(columns: Columns, rows: Iterable[Sequence[str]]) -> None:
    """Print `rows` under the headings of `columns`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    # Text, because a plain string would have its [brackets] read as markup.
    for heading, justify in columns.items():
        table.add_column(Text(_fit(heading)), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_fit(cell)) for cell in row))
    print_rich(table)


def print_rich(shown: "RenderableType") -> None:
    """Print a table or a tree of rich; lines wrap at a terminal's width, and nowhere in a pipe."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _WIDTH_IN_A_PIPE).print(shown)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print `facts` one below the other under `title`, the names to the left."""
    print_line(title)
    names = {name: _fit(name) for name in facts}
    width = max(map(len, names.values()))
    for name, value in facts.items():
        print_line(f"  {names[name]:<{width}}  {value}")


def print_line(text: str, *, err: bool = False) -> None:
    """Print one line, without what would steer a terminal, on standard output or standard error; shortened if long."""
    typer.echo(printable(brief(text, _LONGEST_LINE)), err=err)


def _fit(cell: str) -> str:
    return printable(brief(cell, _LONGEST_CELL))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a numpy scalar or array
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
