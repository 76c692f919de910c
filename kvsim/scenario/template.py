"""A commented scenario file: every option with what it does, those that were asked for in force, the others remarks."""

import json
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any

from kvsim.scenario.options import GROUPS, Option
from kvsim.scenario.scenario_file import OPTIONS

FIRST = {"trace": "azure-2023-code", "limit": 1000, "model": "llama-3.1-8b", "gpu": "h100-sxm"}
"""A scenario that ends within seconds, for whoever has not said what to simulate."""


def template(name: str, schema: str, given: Mapping[str, Any]) -> str:
    """The text of the file `name`, checked in editors by the file `schema`; YAML as `load_scenario` takes it.

    `given` are options by their keys, as a file holds them; what must be given and is not is as in `FIRST`. An option
    whose mark of a remark is taken away has its default.
    """
    said = started(given)
    lines = [
        f"# yaml-language-server: $schema={schema}",
        f"# kvsim simulate --scenario {name}, or compare with several policies; a flag of the command line wins.",
        "# Lines like #gpus: 1 show defaults: take the # away to change one. N may be 50k, SIZE 80GiB, TIME 100ms.",
    ]
    for group in GROUPS:
        lines += ["", f"# -- {group} --"]
        for one in (one for one in OPTIONS if one.group == group):
            lines += [f"# {_words(one)}", _line(one, said)]
    return "\n".join(lines) + "\n"


def started(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, with what else a scenario must have."""
    return {key: value for key, value in FIRST.items() if key != "limit" or "trace" not in given} | dict(given)


def _words(one: Option) -> str:
    return f"{one.metavar + ': ' if one.metavar else ''}{one.help}"


def _line(one: Option, said: Mapping[str, Any]) -> str:
    if one.key in said:
        return f"{one.key}: {_yaml(said[one.key])}"
    return f"#{one.key}: {_yaml(None if one.default is MISSING else one.default)}"


def _yaml(value: Any) -> str:
    """JSON on one line is YAML."""
    return json.dumps(value, default=list)
