"""What commands print: tables for people, JSON for machines, all of it on standard output."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

Columns = Mapping[str, Literal["left", "right"]]
"""How each column is aligned, by its heading."""

SCHEMA_VERSION = 1
if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDTH_IN_A_PIPE = 1000  # no terminal is there to wrap lines for

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def print_json(document: Mapping[str, Any]) -> None:
    """Print `document` with its `schema_version`; numpy values become plain ones, NaN and infinities null."""
    typer.echo(json.dumps({"schema_version": SCHEMA_VERSION, **_plain(document)}, indent=2, allow_nan=False))


def print_table(columns: Columns, rows: Iterable[Sequence[str]]) -> None:
    """Print `rows` under the headings of `columns`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading, justify in columns.items():
        table.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        # Text, because a plain string would have its [brackets] read as markup.
        table.add_row(*(Text(cell) for cell in row))
    print_rich(table)


def print_rich(shown: "RenderableType") -> None:
    """Print a table or a tree of rich; lines wrap at a terminal's width, and nowhere in a pipe."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _WIDTH_IN_A_PIPE).print(shown)


def print_facts(title: str, facts: Mapping[str, str]) -> None:
    """Print `facts` one below the other under `title`, the names to the left."""
    typer.echo(title)
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"  {name:<{width}}  {value}")


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
