"""`kvsim simulate` and `kvsim compare`: replay a trace under one policy, or under several beside each other."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.formats import Formats, formats_of
from kvsim.cli.options import AllowCode, CalibrateFrom, ScenarioFile, given_options, with_options
from kvsim.cli.output import JsonFlag, print_line

if TYPE_CHECKING:
    from kvsim.results.folder import Held
    from kvsim.results.summary import Result
    from kvsim.run.simulate import Setup
    from kvsim.scenario.scenario_file import Scenario
    from traces import Trace

INTERRUPTED = 130


def _print_schema(wanted: bool) -> None:
    from json import dumps

    from kvsim.scenario.scenario_file import schema

    if wanted:
        typer.echo(dumps(schema(), indent=2))
        raise typer.Exit


@with_options
def replay(
    ctx: typer.Context,
    scenario: ScenarioFile = None,
    allow_code: AllowCode = False,
    _schema: Annotated[
        bool,
        typer.Option(
            "--schema", callback=_print_schema, is_eager=True, help="Print the JSON Schema of such files and exit."
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write summary, tables and a report into this folder.")
    ] = None,
    formats: Formats = None,
    calibrate_from: CalibrateFrom = None,
    json: JsonFlag = False,
    **_options: object,  # those of the scenario, which are read from the context
) -> None:
    """Replay a trace of requests on a simulated cluster."""
    from kvsim.cli.process import finishing
    from kvsim.cli.simulate_output import print_comparison, print_run, progress_bars
    from kvsim.results.repeats import gather
    from kvsim.run.jobs import Job
    from kvsim.run.parallel import simulate_all
    from policies import describe

    several = ctx.info_name == "compare"
    reports = formats_of(formats, out)
    asked = _scenario(ctx, scenario, several, allow_code=allow_code)
    asked, calibration = _calibrated(asked, calibrate_from)
    setups = asked.setups()
    _check_setup(setups[0], out)
    drawn = asked.load_traces()
    requests = drawn[0]
    _look_over(setups, requests)
    jobs = [
        Job(each, setup, asked.seed + i if len(drawn) > 1 else None) for i, each in enumerate(drawn) for setup in setups
    ]
    labels = [describe(setup.policy) for setup in setups]
    with _folder(out, labels, reports) as folder:
        with progress_bars([job.label for job in jobs], len(requests)) as show:
            found, interrupted = simulate_all(jobs, show)
        missing = [label for index, label in enumerate(labels) if index not in found]
        asked_for = range(len(setups) if interrupted else len(jobs))
        results = gather(asked, [found[i] for i in asked_for if i in found], len(setups), whole=not interrupted)
        results = [replace(one, inputs={**one.inputs, **calibration}) for one in results]
        if not any((result.requests["status"] == "finished").any() for result in results) and interrupted:
            print_line("interrupted before a request had finished: there are no results", err=True)
            raise typer.Exit(INTERRUPTED)
        _warn_of_nothing_seen(asked, results[0])
        late: list[int] = []
        try:
            if folder is not None:
                from kvsim.report.written import write_held

                with finishing() as late:
                    stated: dict[str, Any] = {"slo": asked.slo_s, "warmup_s": asked.warmup}
                    write_held(results, folder, formats=reports, missing=missing, **stated)
        finally:  # what took so long to find is shown, whether or not it could be written
            if several:
                print_comparison(results, asked.slo_s, asked.warmup, missing, json=json)
            else:
                print_run(results[0], asked.slo_s, asked.warmup, json=json)
    if interrupted:
        without = f", without {', '.join(missing)}" if missing else ""
        print_line(f"interrupted: these are the results so far{without}", err=True)
    elif late:
        print_line("interrupted while the results were written: they are whole", err=True)
    if interrupted or late:
        raise typer.Exit(INTERRUPTED)


def _check_setup(setup: "Setup", out: Path | None) -> None:
    """Warn of what was read in another way than it was written; refuse what there would be no file for."""
    for note in (*setup.model.notes, *setup.gpu.notes):
        _warn(note)
    if setup.perfetto and out is None:
        window = "-".join(f"{end_s:g}" for end_s in setup.perfetto)
        raise ValueError(f"perfetto={window} is written to trace.perfetto.json in the folder of --out; add --out DIR")


def _calibrated(asked: "Scenario", file: str | None) -> "tuple[Scenario, dict[str, Any]]":
    """The scenario with the constants that a file of records tells, and what to say of them beside a run's inputs."""
    if file is None:
        return asked, {}
    from kvsim.cli.progress import counted
    from kvsim.observed.calibration import KEYS, calibrated

    with counted("simulations of the records") as progress:
        calibration = calibrated(file, asked.setups()[0], dict.fromkeys(asked.given), progress)
    for words in calibration["warnings"]:
        _warn(words)
    fitted = {KEYS[key]: value for key, value in calibration["constants"].items()}
    return replace(asked, setup={**asked.setup, **fitted}), {"calibration": calibration}


def _scenario(ctx: typer.Context, file: Path | None, several: bool, *, allow_code: bool) -> "Scenario":
    """What the command line asks for, on top of the scenario file."""
    from kvsim.scenario.scenario_file import load_scenario

    if allow_code and file is None:
        raise ValueError("--allow-code is of --scenario: a policy of the command line runs without it; leave it out")
    asked = load_scenario(given_options(ctx), file, allow_code=allow_code)
    if several and "policy" not in asked.given:
        raise ValueError(
            "compare needs policies: name each with --policy, or under the key policy of a --scenario file"
        )
    if not several and len(asked.policy) > 1:
        raise ValueError(f"simulate takes one policy, not {', '.join(asked.policy)}; use kvsim compare for several")
    return asked


def _look_over(setups: Sequence["Setup"], trace: "Trace") -> None:
    """Refuse what no policy knows, and warn of what has no effect or goes beyond the model."""
    _check_counts(setups, trace)
    _warn_of_positions(setups[0], trace)
    _warn_of_unused_caches(setups)


def _check_counts(setups: Sequence["Setup"], trace: "Trace") -> None:
    """Refuse counts that no policy draws, and warn of those that no prompt of this trace is long enough for."""
    import numpy as np

    from kvsim.plans.derive import PlanTable
    from kvsim.text.names import unknown_name

    if not setups[0].counts:
        return
    lengths = np.unique(np.quantile(trace.prompt_tokens, np.linspace(0, 1, 9), method="nearest")).tolist()
    met: set[str] = set()
    known: set[str] = set()
    for setup in setups:
        table = PlanTable(setup.policy, setup.rank, setup.machine(), setup.counts)
        table.warm(lengths, setup.max_num_batched_tokens)
        met |= table.drawn
        table.warm([setup.model.max_positions], setup.max_num_batched_tokens)
        known |= table.drawn
    for name in setups[0].counts:
        if name not in known:
            raise unknown_name("count", name, sorted(known))
        if name not in met:
            _warn(f"the count {name} has no effect: no prompt of this trace is long enough for the policy to draw it")


def _warn_of_positions(setup: "Setup", trace: "Trace") -> None:
    contexts = trace.prompt_tokens + trace.output_tokens
    beyond = int((contexts > setup.model.max_positions).sum())
    if beyond:
        _warn(
            f"{beyond:,} of {len(trace):,} requests, the longest of {int(contexts.max()):,} tokens, are beyond the "
            f"{setup.model.max_positions:,} positions of {setup.model.name}"
        )


def _warn_of_unused_caches(setups: Sequence["Setup"]) -> None:
    from kvsim.scenario.choices import CACHE_ROUTERS
    from policies import Reuse, describe, reuse_of

    for setup in setups:
        cached_bytes = sum(setup.prefix_cache_bytes.values())
        if cached_bytes and reuse_of(setup.policy) is Reuse.NOTHING:
            name = describe(setup.policy)
            also = f"; router={setup.router} goes by load alone" if setup.router in CACHE_ROUTERS else ""
            _warn(f"the prefix cache has no effect on {name}, whose state no other request can use{also}")
        if setup.session_kv != "recompute" and reuse_of(setup.policy) is not Reuse.BLOCKS:
            name = describe(setup.policy)
            _warn(f"session_kv={setup.session_kv} has no effect on {name}, whose state no longer prompt can use")


def _warn_of_nothing_seen(asked: "Scenario", result: "Result") -> None:
    arrival_s = result.requests["arrival_s"]
    begin_s = float(arrival_s.min())
    if asked.warmup > arrival_s.max():
        _warn(
            f"warmup={asked.warmup:g}s leaves no request for the latencies: the last arrives at {arrival_s.max():g} s"
        )
    if result.operations is not None and not len(result.operations["begin_s"]):
        end_s = begin_s + result.makespan_s
        _warn(f"nothing runs in the window of perfetto: the run goes from {begin_s:g} s to {end_s:g} s")


def _folder(out: Path | None, policies: Sequence[str], formats: Sequence[str]) -> AbstractContextManager["Held | None"]:
    """The folder of --out, held from before the run until its results are in it; None where it was not given."""
    from kvsim.results.files import holding

    return nullcontext() if out is None else holding(out, policies, formats)


def _warn(text: str) -> None:
    print_line(f"warning: {text}", err=True)
