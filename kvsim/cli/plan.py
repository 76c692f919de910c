"""`kvsim plan`: from a trace and an SLO to the cheapest fleet, and what it takes to run it."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.formats import Formats, formats_of
from kvsim.cli.options import AllowCode, CalibrateFrom, ScenarioFile, given_options, with_options
from kvsim.cli.output import JsonFlag, print_json, print_line
from kvsim.scenario.scenario_file import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

INTERRUPTED, UNMET = 130, 3
_OWN = ("gpu", "policy", "slo", "slo_classes", "prefill_gpus", "perfetto")  # the planner's, or nothing of its
_OPTIONS = [one for one in OPTIONS if one.key not in _OWN]


def plan(
    ctx: typer.Context,
    slo: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=TIME,...",
            help="What must hold: ttft_p99=10s,tpot_p99=100ms; for a class or tenant chat:ttft_p99=2s.",
        ),
    ],
    gpu: Annotated[
        list[str] | None,
        typer.Option(metavar="GPU", help="A GPU of the catalogue or a YAML file; repeat it for several."),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(metavar="POLICY", help="name or name:key=value,...; repeat it. Default: full.")
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML of USD an hour by GPU. Default: the catalogue's.")
    ] = None,
    quality: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What kvsim quality --save wrote. Default: the package's table.")
    ] = None,
    max_gpus: Annotated[int, typer.Option(min=1, metavar="N", help="The most GPUs to buy.")] = 1024,
    pools: Annotated[
        bool, typer.Option("--pools/--no-pools", help="Try prompts and decoding on replicas of their own.")
    ] = True,
    calibrate_from: CalibrateFrom = None,
    calibrate_tp: Annotated[
        int, typer.Option(min=0, metavar="N", help="GPUs of a replica of the server that was measured. Default: --tp.")
    ] = 0,
    calibrate_replicas: Annotated[int, typer.Option(min=1, metavar="N", help="How many of them it had.")] = 1,
    scenario: ScenarioFile = None,
    allow_code: AllowCode = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write plan.json and a report into this folder.")
    ] = None,
    formats: Formats = None,
    json: JsonFlag = False,
    **_options: object,  # those of the scenario, which are read from the context
) -> None:
    """Find the fewest GPUs that serve a trace within an SLO.

    Options that are given are fixed (--tp, --router, --prefix-cache-ddr, ...); --gpus N asks for the best fleet of N
    GPUs. The exit code is 3 where nothing holds the SLO; the nearest fleet is printed then.
    """
    began_s = time.perf_counter()
    from kvsim.cli.command_line import command_line
    from kvsim.cli.plan_files import holding_plan, write_plan
    from kvsim.cli.plan_output import print_first, print_plan
    from kvsim.cli.progress import counted
    from kvsim.planning.plan import answered
    from kvsim.planning.question import Measured, question_of

    reports = formats_of(formats, out)
    measured = None if calibrate_from is None else Measured(calibrate_from, calibrate_tp, calibrate_replicas)
    with counted("simulations of the records") as progress:
        question = question_of(
            slo=slo,
            gpu=gpu,
            policy=policy,
            prices=prices,
            quality=quality,
            max_gpus=max_gpus,
            pools=pools,
            scenario=scenario,
            allow_code=allow_code,
            options=given_options(ctx, _OPTIONS),
            measured=measured,
            progress=progress,
        )
    for note in question.notes():
        print_line(f"warning: {note}", err=True)
    with holding_plan(out, reports) as folder:
        with counted("simulations") as progress:
            document = answered(question, began_s, print_first, progress)
        whole, command = True, command_line(ctx, {"formats", "json", "out"})
        try:
            if folder is not None:
                whole = write_plan(document, command, reports, folder, allow_code=allow_code)
        finally:  # what took so long to find is shown, whether or not it could be written
            if json:
                print_json(document)
            else:
                print_plan(document)
    if not whole:
        print_line("interrupted: the page is without a run of the plan", err=True)
        raise typer.Exit(INTERRUPTED)
    _end(document)


def _end(document: "Mapping[str, Any]") -> None:
    if document["partial"]:
        print_line("interrupted: this is what was found so far", err=True)
        raise typer.Exit(INTERRUPTED)
    if document["answer"] is None:
        raise typer.Exit(UNMET)


plan = with_options(plan, _OPTIONS)
