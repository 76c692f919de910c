"""What `kvsim plan --out` writes: the document, and a page about it for who decides."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsim.results.folder import Held
    from kvsim.results.summary import Result
    from kvsim.scenario.scenario_file import Scenario


@contextmanager
def holding_plan(out: Path | None, formats: Sequence[str]) -> Iterator["Held | None"]:
    """The folder of --out, from before the search until the plan is in it; None where it was not given."""
    from kvsim.results.documents import PLAN, earlier_plan
    from kvsim.results.folder import hold

    if out is None:
        yield None
        return
    with hold(out, earlier_plan, [PLAN, *(f"report.{name}" for name in formats)]) as folder:
        yield folder


def write_plan(
    document: Mapping[str, Any], command: str, formats: Sequence[str], folder: "Held", *, allow_code: bool
) -> bool:
    """Put `plan.json` and reports in the place of an earlier plan's; the plan's fleet is played once for them.

    False where Ctrl-C ended that run: the page is without it then.
    """
    from kvsim.cli.output import json_text
    from kvsim.report.formats import in_format
    from kvsim.report.plan import plan_contents
    from kvsim.results.documents import PLAN, write_pages

    text = json_text(document)
    chosen = document["answer"] or document.get("nearest")
    contents, whole = None, True
    if chosen is not None and not document["partial"]:
        asked, played = _played(chosen["simulate"], allow_code=allow_code)
        whole = not played.partial
        if whole:
            contents = plan_contents(document, command, played, slo=asked.slo_s, warmup_s=asked.warmup)
    said = contents or plan_contents(document, command)
    pages = {name: in_format(said, name) for name in formats}

    def fill(new: Path) -> None:
        (new / PLAN).write_text(text + "\n", encoding="utf-8")
        write_pages(pages, new)

    folder.replace(fill)
    return whole


def _played(command: str, *, allow_code: bool) -> "tuple[Scenario, Result]":
    """What the `kvsim simulate` of a plan asks for, and what comes of it on the first seed's trace."""
    from kvsim.cli.app import COMMANDS
    from kvsim.cli.deferred import Deferred
    from kvsim.cli.options import given_options
    from kvsim.run.simulate import simulate
    from kvsim.scenario.scenario_file import load_scenario

    _, name, *words = shlex.split(command)
    context = Deferred(name, *COMMANDS[name]).make_context(name, words)
    asked = load_scenario(given_options(context), context.params["scenario"], allow_code=allow_code)
    (setup,) = asked.setups()
    return asked, simulate(asked.load_traces()[0], setup)
