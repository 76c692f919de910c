"""`kvsim simulate` and `kvsim compare`: replay a trace under one policy, or under several beside each other."""

# ruff: noqa: ARG001 - the options of a scenario are read from the context, those given alone

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.cli.model import ParamsOption
from kvsim.cli.output import JsonFlag, print_line
from kvsim.scenario.shares import parse_shares
from kvsim.scenario.tenants import parse_named
from policies.shown import shown

if TYPE_CHECKING:
    from kvsim.results.folder import Held
    from kvsim.results.summary import Result
    from kvsim.run.simulate import Setup
    from kvsim.scenario.scenario_file import Scenario
    from traces import Trace

INTERRUPTED = 130
OF_THE_COMMAND = ("scenario", "allow_code", "out", "json")  # every other option belongs to the scenario


def replay(
    ctx: typer.Context,
    trace: Annotated[
        str | None, typer.Option(metavar="TRACE", help="A bundled trace, or a file, also a server's log.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A name of the catalogue, a config.json's path, or ORG/NAME of the local Hugging Face cache.",
        ),
    ] = None,
    gpu: Annotated[str | None, typer.Option(metavar="GPU", help="A GPU of the catalogue or a YAML file.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(metavar="POLICY", help="name or name:key=value,...; compare takes several.")
    ] = None,
    scenario: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with any of these options; what is given here wins.")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let that file name policies as module:Class, whose code is run.")
    ] = False,
    limit: Annotated[str | None, typer.Option(metavar="N", help="Replay the first N requests only.")] = None,
    rate_scale: Annotated[float | None, typer.Option(metavar="X", help="Let requests arrive X times as fast.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of traces that are drawn at random.")] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="So many from --seed on, or resample: adds 95 % intervals.")
    ] = None,
    skip_bad_rows: Annotated[
        bool | None, typer.Option("--skip-bad-rows", help="Count malformed rows instead of refusing them.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", help="All GPUs; the replicas are gpus / (tp x pp).")] = None,
    tp: Annotated[int | None, typer.Option(metavar="N", help="GPUs that share every layer of a replica.")] = None,
    pp: Annotated[int | None, typer.Option(metavar="N", help="Stages of tp GPUs that layers are split into.")] = None,
    prefill_gpus: Annotated[
        int | None, typer.Option(metavar="N", help="GPUs that only process prompts; the others decode. Default: none.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="HOST", help="A host of the catalogue or a YAML file. Default: by the GPU.")
    ] = None,
    fidelity: Annotated[str | None, typer.Option(metavar="step|op", help="op: every operation, links shared.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="fcfs|priority|fair", help="Whose request is admitted next.")
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="round-robin, least-loaded, prefix-affinity or kv-aware (Mooncake)."),
    ] = None,
    preemption: Annotated[str | None, typer.Option(metavar="swap|recompute", help="When memory runs out.")] = None,
    sessions: Annotated[
        str | None, typer.Option(metavar="open|closed", help="closed: a session waits for its answers, then thinks.")
    ] = None,
    session_kv: Annotated[
        str | None,
        typer.Option(metavar="recompute|keep|swap|cheapest", help="What becomes of a session's KV between turns."),
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(metavar="N", help="Sequences that run at a time.")] = None,
    max_num_batched_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of an iteration, which bound the prefill chunk.")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(metavar="SHARE", help="What an engine may use of HBM.")
    ] = None,
    host_memory_utilization: Annotated[
        float | None, typer.Option(metavar="SHARE", help="What all engines of a host may use of DDR.")
    ] = None,
    prefix_cache_hbm: Annotated[
        str | None, typer.Option(metavar="SIZE", help="HBM of each host for cached prefixes. Default: none.")
    ] = None,
    prefix_cache_ddr: Annotated[
        str | None, typer.Option(metavar="SIZE", help="DDR of each host for cached prefixes. Default: none.")
    ] = None,
    prefix_cache_nvme: Annotated[
        str | None, typer.Option(metavar="SIZE", help="NVMe of each host for cached prefixes. Default: none.")
    ] = None,
    prefix_cache_remote: Annotated[
        str | None, typer.Option(metavar="SIZE", help="A pool of all hosts over RDMA for them. Default: none.")
    ] = None,
    prefix_cache_eviction: Annotated[
        str | None, typer.Option(metavar="NAME", help="lru, lfu, fifo, belady (knows the future), scheduler-aware.")
    ] = None,
    prefix_cache_write: Annotated[
        str | None, typer.Option(metavar="through|back", help="To every tier, or to the next one when evicted.")
    ] = None,
    prefix_cache_sharing: Annotated[
        str | None, typer.Option(metavar="tenant|all", help="Whose prompts hit a cached block. Default: its tenant's.")
    ] = None,
    prefix_cache_reuse: Annotated[
        str | None, typer.Option(metavar="always|cheaper", help="cheaper: compute anew what would take longer to load.")
    ] = None,
    prefix_cache_prefetch: Annotated[
        bool | None, typer.Option("--prefix-cache-prefetch", help="Fetch a waiting prompt's blocks up to DDR.")
    ] = None,
    prefix_cache_quota: Annotated[
        str | None, typer.Option(metavar="SHARE|NAME=SHARE,...", help="Of every tier, a tenant's own. Default: none.")
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Leave when the first token has not come by then. Default: never."),
    ] = None,
    speculate: Annotated[
        int | None, typer.Option(metavar="K", help="Guess K tokens ahead and verify them in one step. Default: none.")
    ] = None,
    acceptance: Annotated[
        str | None, typer.Option(metavar="P|P,P,...", help="That a guess holds if those before it did.")
    ] = None,
    tree: Annotated[
        int | None, typer.Option(metavar="N", help="Guesses verified at once. Default: K, a chain.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who guesses: a model, medusa, hidden-transfer or lookup.")
    ] = None,
    draft_share: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Or what a run of a draft takes of one of the model.")
    ] = None,
    perfetto: Annotated[
        str | None, typer.Option(metavar="FROM-TO", help="Record every operation in this window, as 10s-10.5s.")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Of cached keys and values.")] = None,
    weight_dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Of all weights.")] = None,
    params: ParamsOption = None,
    counts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SHARE,...|FILE", help="What data decide, as shares of its maximum, or a recording."),
    ] = None,
    slo: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TIME,...", help="Bounds that goodput counts: ttft=10s,tpot=100ms.")
    ] = None,
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:KEY=VALUE,...",
            help="A tenant's weight, priority (larger first), slo_class, quota, replicas, timeout; NAME may hold *.",
        ),
    ] = None,
    slo_class: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:LATENCY=TIME,...", help="Bounds of the tenants of a class, in place of --slo."),
    ] = None,
    prompt_token_weight: Annotated[
        float | None, typer.Option(metavar="X", help="Service of a prompt's token, for scheduler fair. Default: 1.")
    ] = None,
    output_token_weight: Annotated[
        float | None, typer.Option(metavar="X", help="Service of an output's token. Default: 2.")
    ] = None,
    warmup: Annotated[
        str | None, typer.Option(metavar="TIME", help="Leave requests that arrive earlier out of the latencies.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write summary, tables and report.html into this folder.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Replay a trace of requests on a simulated cluster."""
    from kvsim.cli.process import finishing
    from kvsim.cli.simulate_output import print_comparison, print_run, progress_bars
    from kvsim.report.written import write_held
    from kvsim.results.repeats import gather
    from kvsim.run.parallel import Job, simulate_all
    from policies import describe

    several = ctx.info_name == "compare"
    asked = _scenario(ctx, scenario, several, allow_code=allow_code)
    setups = asked.setups()
    for note in setups[0].model.notes:
        _warn(note)
    if asked.perfetto and out is None:
        window = "-".join(f"{end_s:g}" for end_s in asked.perfetto)
        raise ValueError(f"perfetto={window} is written to trace.perfetto.json in the folder of --out; add --out DIR")
    drawn = asked.load_traces()
    requests = drawn[0]
    _check_counts(asked, setups, requests)
    _warn_of_positions(setups[0], requests)
    _warn_of_unused_caches(setups)
    jobs = [Job(each, setup) for each in drawn for setup in setups]
    labels = [describe(setup.policy) for setup in setups]
    runs = [f"{label}, seed {asked.seed + i}" for i in range(len(drawn)) for label in labels]
    with _folder(out, labels) as folder:
        with progress_bars(runs if len(drawn) > 1 else labels, len(requests)) as show:
            found, interrupted = simulate_all(jobs, show)
        missing = [label for index, label in enumerate(labels) if index not in found]
        asked_for = range(len(setups) if interrupted else len(jobs))
        results = gather(asked, [found[i] for i in asked_for if i in found], len(setups), whole=not interrupted)
        if not any((result.requests["status"] == "finished").any() for result in results) and interrupted:
            print_line("interrupted before a request had finished: there are no results", err=True)
            raise typer.Exit(INTERRUPTED)
        _warn_of_nothing_seen(asked, results[0])
        late: list[int] = []
        try:
            if folder is not None:
                with finishing() as late:
                    write_held(results, folder, missing=missing, slo=asked.slo_s, warmup_s=asked.warmup)
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


def _scenario(ctx: typer.Context, file: Path | None, several: bool, *, allow_code: bool) -> "Scenario":
    """What the command line asks for, on top of the scenario file."""
    from kvsim.scenario.scenario_file import scenario

    if allow_code and file is None:
        raise ValueError("--allow-code is of --scenario: a policy of the command line runs without it; leave it out")
    given = {
        name: value for name, value in ctx.params.items() if name not in OF_THE_COMMAND and _on_command_line(ctx, name)
    }
    if "counts" in given:
        given["counts"] = parse_shares(given["counts"])
    if "slo" in given:
        given["slo"] = _bounds(given["slo"])
    for flag, key in (("tenant", "tenants"), ("slo_class", "slo_classes")):
        if flag in given:
            given[key] = parse_named(f"--{flag.replace('_', '-')}", given.pop(flag))
    asked = scenario(given, file, allow_code=allow_code)
    if several and "policy" not in asked.model_fields_set:
        raise ValueError(
            "compare needs policies: name each with --policy, or under the key policy of a --scenario file"
        )
    if not several and len(asked.policy) > 1:
        raise ValueError(f"simulate takes one policy, not {', '.join(asked.policy)}; use kvsim compare for several")
    return asked


def _on_command_line(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _bounds(texts: Sequence[str]) -> dict[str, str]:
    bounds: dict[str, str] = {}
    for item in ",".join(texts).split(","):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--slo {shown(item)} must be written name=value")
        if name in bounds:
            raise ValueError(f"--slo gives {shown(name)} twice; say it once")
        bounds[name] = value
    return bounds


def _check_counts(asked: "Scenario", setups: Sequence["Setup"], trace: "Trace") -> None:
    """Refuse counts that no policy draws, and warn of those that no prompt of this trace is long enough for."""
    import numpy as np

    from kvsim.plans.derive import PlanTable
    from kvsim.text.names import unknown_name

    if not asked.counts:
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
    for name in asked.counts:
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


def _folder(out: Path | None, policies: Sequence[str]) -> AbstractContextManager["Held | None"]:
    """The folder of --out, held from before the run until its results are in it; None where it was not given."""
    from kvsim.results.files import holding

    return nullcontext() if out is None else holding(out, policies)


def _warn(text: str) -> None:
    print_line(f"warning: {text}", err=True)
