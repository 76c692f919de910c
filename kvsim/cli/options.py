"""The flags of a simulation, made from the options as `Setup` and `Scenario` state them."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvsim.scenario.options import Option
from kvsim.scenario.scenario_file import OPTIONS

ScenarioFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="YAML with any of these options; what is given here wins.")
]
CalibrateFrom = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Fit --kernel-slowdown, --iteration-overhead and --request-overhead to records of a server's clients.",
    ),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Let that file name policies as module:Class, whose code is run.")
]


def with_options(command: Callable[..., None], options: Sequence[Option] = OPTIONS) -> Callable[..., None]:
    """`command`, which reads its options from the context, with a flag for each one that a simulation has."""
    own = [one for one in inspect.signature(command).parameters.values() if one.kind is not one.VAR_KEYWORD]
    parameters = [*own, *map(_parameter, options)]
    setattr(command, "__signature__", inspect.Signature(parameters))  # noqa: B010 - mypy knows no such attribute
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def given_options(context: typer.Context, options: Sequence[Option] = OPTIONS) -> dict[str, Any]:
    """What the command line gives, by the keys of a scenario file; ValueError for text that an option cannot be."""
    given = {}
    for one in options:
        source, value = context.get_parameter_source(_name(one)), context.params[_name(one)]
        if source is not None and source.name == "COMMANDLINE":
            given[one.key] = value if one.kind.gathers is None else one.kind.gathers(value)
    return given


def _name(one: Option) -> str:
    return one.flag.removeprefix("--").replace("-", "_")


def _parameter(one: Option) -> inspect.Parameter:
    """A parameter as typer reads it; what it does without the flag is for the scenario to say."""
    default = f" Default: {one.default_words}." if one.default_words not in ("", "required") else ""
    stated = typer.Option(
        one.flag, metavar=one.metavar or None, help=one.help + default, rich_help_panel=one.group, show_default=False
    )
    flag: Any = list[str] if one.kind.gathers else one.kind.flag
    annotation = Annotated[flag | None, stated]
    return inspect.Parameter(_name(one), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
