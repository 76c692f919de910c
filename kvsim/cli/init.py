"""`kvsim init`: a commented scenario to start from, and its JSON Schema for editors."""

from pathlib import Path
from typing import Annotated

import typer

from kvsim.cli.options import given_options, with_options
from kvsim.cli.output import print_line

SCHEMA = "kvsim.schema.json"


@with_options
def init(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Which is made; none that exists is touched.")] = Path(
        "scenario.yaml"
    ),
    **_options: object,  # those of the scenario, which are read from the context
) -> None:
    """Write a scenario file with every option.

    Options that are given are in force in it; the others are remarks with their defaults.
    """
    from json import dumps

    from kvsim.scenario.scenario_file import load_scenario, schema
    from kvsim.scenario.template import started, template

    given = given_options(ctx)
    load_scenario(started(given)).setups()
    text = template(file.name, SCHEMA, given)
    for path, content in ((file, text), (file.with_name(SCHEMA), dumps(schema(), indent=2) + "\n")):
        try:
            with path.open("x", encoding="utf-8") as new:
                new.write(content)
        except FileExistsError:
            if path == file:
                raise ValueError(f"{path} exists, and is left as it is; name another file") from None
            path.write_text(content, encoding="utf-8")  # the schema is the program's own
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written: {error.strerror}; name a file in a folder that takes one"
            ) from None
    print_line(f"{file} is written, with {file.with_name(SCHEMA).name} for editors; kvsim simulate --scenario {file}")
