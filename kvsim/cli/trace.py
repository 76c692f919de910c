"""`kvsim trace`: list, describe, generate and convert request traces."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kvsim.cli.batching import batching
from kvsim.cli.output import Columns, JsonFlag, print_facts, print_json, print_line, print_table
from kvsim.cli.trace_options import LimitOption, SeedOption, SkipOption, TraceArgument
from kvsim.text.units import format_count, format_s, parse_duration_s, parse_tokens

app = typer.Typer(no_args_is_help=True)

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the file when it exists.")]


@app.command("list")
def list_traces(
    formats: Annotated[
        bool, typer.Option("--formats", help="List the formats that are read, and what is taken for granted, instead.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """List the bundled traces, with their licences and where they come from."""
    import traces

    if formats:
        _list_formats(json)
        return
    bundled = traces.names()
    if json:
        shown = ("name", "description", "licence", "attribution")
        print_json({"traces": [{name: getattr(trace, name) for name in shown} for trace in bundled]})
        return
    rows = ((trace.name, trace.description, trace.licence, trace.attribution) for trace in bundled)
    columns: Columns = dict.fromkeys(("trace", "description [options]", "licence", "attribution"), "left")
    print_table(columns, rows)


def _list_formats(json: bool) -> None:
    from traces.formats import FORMATS, SHOWN

    if json:
        print_json({"formats": [{name: getattr(known, name) for name in SHOWN} for known in FORMATS]})
        return
    columns: Columns = dict.fromkeys(("format", "recognised by", "times", "blocks", "refused", "options"), "left")
    print_table(columns, ([getattr(known, name) for name in SHOWN] for known in FORMATS))


@app.command("info")
def show_info(
    trace: TraceArgument,
    lru: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Capacities of LRU caches, in blocks, such as 1000,10k: hits of single blocks, and of a prefix cache, "
            "whose hits end at the first block that is missing.",
        ),
    ] = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    skip_bad_rows: SkipOption = False,
    json: JsonFlag = False,
) -> None:
    """Describe a trace: sizes, rate, burstiness, and how much of its prompts a prefix cache can hit."""
    import traces
    from traces.stats import info

    capacities = [parse_tokens(part) for part in lru.split(",")] if lru is not None else []
    statistics = info(traces.load(trace, limit=limit, seed=seed, skip_bad_rows=skip_bad_rows), capacities)
    if json:
        print_json(statistics)
        return
    print_facts(statistics["name"], _facts(statistics))
    if len(statistics["tenants"]) > 1:
        columns: Columns = {"tenant": "left", "requests": "right", "prompt tokens": "right", "output tokens": "right"}
        rows = ((name, *map(format_count, totals.values())) for name, totals in statistics["tenants"].items())
        print_table(columns, rows)
    for note in statistics["notes"]:
        print_line(f"note: {note}")


@app.command("convert")
def convert_trace(
    source: Annotated[str, typer.Argument(metavar="IN", help="A bundled trace, or a file, also a server's log.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A .jsonl, .csv (either also .gz) or .parquet file.")],
    limit: LimitOption = None,
    seed: SeedOption = 0,
    skip_bad_rows: SkipOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a trace in another format, which the ending of OUT names."""
    import traces

    trace = traces.load(source, limit=limit, seed=seed, skip_bad_rows=skip_bad_rows)
    traces.write(trace, target, overwrite=overwrite)


@app.command("synth")
def synthesize_trace(
    tenant: Annotated[
        list[str],
        typer.Option(
            metavar="TENANT",
            help="name=TEXT,rate=REQUESTS_PER_S and any of arrivals, cv, prompt, output, prefix, turns, think; "
            "repeat it for more tenants.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="OUT", help="A .jsonl, .csv (either also .gz) or .parquet file.")],
    duration: Annotated[
        float | None, typer.Option(metavar="TIME", parser=parse_duration_s, help="How long requests arrive: 10m, 1h.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(metavar="N", parser=parse_tokens, help="How many requests arrive: 500, 100k.")
    ] = None,
    seed: SeedOption = 0,
    block_tokens: Annotated[int, typer.Option(help="Tokens per block of the prefix hashes.")] = 512,
    overwrite: OverwriteOption = False,
) -> None:
    """Generate a trace of several tenants, either as long as --duration or with --requests requests.

    Example: --tenant name=chat,rate=2,turns=3 --tenant name=code,rate=1,prompt=fixed:3000
    """
    import traces
    from traces.synthetic import Tenant, synthesize

    trace = synthesize(
        [Tenant.parse(text) for text in tenant],
        duration_s=duration,
        n_requests=requests,
        seed=seed,
        block_tokens=block_tokens,
    )
    traces.write(trace, out, overwrite=overwrite)


app.command("batching")(batching)


def _facts(statistics: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "requests": f"{statistics['requests']:,}",
        "span": format_s(statistics["span_s"]),
        "prompt tokens": f"{statistics['prompt_tokens']:,}",
        "output tokens": f"{statistics['output_tokens']:,}",
    }
    for side in ("prompt", "output"):
        ranks = statistics[f"{side}_percentiles"].items()
        facts[f"{side} lengths"] = ", ".join(f"{rank} {tokens:,}" for rank, tokens in ranks)
    if statistics["rate_rps"] is not None:
        facts["rate"] = f"{statistics['rate_rps']:.4g} requests/s, inter-arrival CV {statistics['interarrival_cv']:.3f}"
    if statistics["sessions"]:
        facts["sessions"] = f"{statistics['sessions']:,}"
    if statistics["block_tokens"]:
        blocks = statistics["prompt_blocks"]
        facts["prompt blocks"] = f"{blocks:,} of {statistics['block_tokens']} tokens"
        if statistics["infinite_cache_hit_ratio"] is not None:
            facts["hit ratio"] = f"{statistics['infinite_cache_hit_ratio']:.2%} with an infinite prefix cache"
    for capacity, ratio in statistics["lru_hit_ratio"].items():
        prefix = statistics["prefix_lru_hit_ratio"][capacity]
        shown = "no block ids" if ratio is None else f"{ratio:.2%} of blocks, {prefix:.2%} as a prefix cache"
        facts[f"LRU of {int(capacity):,}"] = shown
    if statistics["skipped_rows"]:
        facts["skipped rows"] = f"{statistics['skipped_rows']:,}"
    return facts
