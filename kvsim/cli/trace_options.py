"""How commands are told which trace to read, and how much of it."""

from typing import Annotated

import typer

from kvsim.text.units import parse_tokens

TraceArgument = Annotated[
    str,
    typer.Argument(
        metavar="TRACE", help="A bundled trace (name or name:key=value,...), or a file, also a server's log."
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", metavar="N", parser=parse_tokens, help="Read the first N requests only.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of traces that are drawn at random.")]
SkipOption = Annotated[bool, typer.Option("--skip-bad-rows", help="Count malformed rows instead of refusing them.")]
