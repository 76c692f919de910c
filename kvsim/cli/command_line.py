"""The command that somebody gave, as words to give again."""

import shlex
from collections.abc import Collection, Iterator
from typing import Any

import typer


def command_line(context: typer.Context, without: Collection[str] = ()) -> str:
    """The command of a context with the flags that were given, in the order of its help, but for those of `without`."""
    words = ["kvsim", str(context.info_name)]
    for one in context.command.params:
        source = context.get_parameter_source(one.name or "")
        if one.name not in without and source is not None and source.name == "COMMANDLINE":
            words += _words(one.opts[0], one.secondary_opts, context.params[one.name or ""])
    return shlex.join(words)


def _words(flag: str, contrary: list[str], value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield from [flag] if value else contrary[:1]
        return
    for each in value if isinstance(value, list | tuple) else [value]:
        yield from (flag, str(each))
