"""The flag `--format` of the commands that write a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvsim.results.documents import FORMATS

Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        metavar="|".join(FORMATS),
        help=f"Write the report as this; repeat it for several. Default: {FORMATS[0]}.",
        show_default=False,
    ),
]


def formats_of(given: Sequence[str] | None, out: Path | None) -> list[str]:
    """The formats of a report, each once. Raises ValueError for an unknown one, and where no folder takes them."""
    from kvsim.text.names import unknown_name

    for name in given or ():
        if name not in FORMATS:
            raise unknown_name("--format", name, FORMATS)
    if given and out is None:
        raise ValueError(f"--format {given[0]} is of the report that --out writes; add --out DIR")
    return list(dict.fromkeys(given or FORMATS[:1]))
