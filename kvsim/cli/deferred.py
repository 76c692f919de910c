"""Commands whose modules are imported when they run, so that listing all of them takes no time."""

from functools import cached_property
from importlib import import_module
from inspect import getdoc
from typing import Any

import typer
from typer.core import TyperCommand


class Deferred(TyperCommand):
    """A command or a group of commands, known by its line of help until somebody asks for it.

    `source` is where it stands, as `module:name` of a function or of a `typer.Typer` with a group.
    """

    def __init__(self, name: str, source: str, help: str) -> None:  # noqa: A002 - typer's word for it
        super().__init__(name, help=help)
        self.source = source

    @cached_property
    def loaded(self) -> Any:
        """The command itself."""
        module, name = self.source.split(":")
        found = getattr(import_module(module), name)
        outer = typer.Typer(add_completion=False)
        if isinstance(found, typer.Typer):
            found.info.name, found.info.help = self.name, self.help
            return typer.main.get_group(found)
        further = (getdoc(found) or "").partition("\n\n")[2]  # its first line is said in the list, for all to see
        outer.command(self.name, help=f"{self.help}\n\n{further}" if further else self.help)(found)
        return typer.main.get_command(outer)

    def make_context(self, *args: Any, **options: Any) -> Any:
        """The context of the command itself, which goes on from there."""
        return self.loaded.make_context(*args, **options)
