"""`kvsim trace batching`: what prompts of a trace's lengths cost padded, packed, without padding and in chunks."""

from typing import Annotated

import typer

from kvsim.cli.model import ParamsOption
from kvsim.cli.output import Columns, JsonFlag, print_json, print_line, print_table
from kvsim.cli.trace_options import LimitOption, SeedOption, SkipOption, TraceArgument
from kvsim.text.units import bounded_tokens, format_count, format_s, parse_duration_s, parse_params
from policies.shown import shown


def batching(
    trace: TraceArgument,
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="A name of the catalogue, a config.json's path, or ORG/NAME of the local Hugging Face cache.",
        ),
    ] = ("llama-3.1-8b"),
    gpu: Annotated[str, typer.Option(metavar="GPU", help="A GPU of the catalogue or a YAML file.")] = "a100-80g-sxm",
    host: Annotated[str | None, typer.Option(metavar="HOST", help="Default: by the GPU.")] = None,
    tp: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs that share every layer.")] = 1,
    batch: Annotated[int, typer.Option(metavar="N", help="Prompts of a batch, in order of arrival.")] = 64,
    chunk: Annotated[str, typer.Option(metavar="N", help="Tokens of a chunk.")] = "8Ki",
    window: Annotated[
        str | None, typer.Option(metavar="FROM-TO", help="Prompts that arrive within, as 0s-60s. Default: all.")
    ] = None,
    limit: LimitOption = None,
    seed: SeedOption = 0,
    skip_bad_rows: SkipOption = False,
    params: ParamsOption = None,
    json: JsonFlag = False,
) -> None:
    """Compare ways to prefill a trace's prompts: padded, packed into rows, without padding, in chunks."""
    import traces
    from kvsim.explain.batching import compare
    from kvsim.hardware.catalogue import load_gpu, load_host
    from kvsim.hardware.machine import Machine
    from kvsim.iteration.clock import Clock
    from kvsim.models import load_model
    from kvsim.plans.derive import PlanTable
    from kvsim.scenario.scenario_file import default_host
    from policies import Full

    card = load_gpu(gpu)
    machine = Machine(gpu=card, host=load_host(host or default_host(card.name)), tp=tp)
    if tp > machine.host.gpus_max:
        raise ValueError(f"tp={tp} exceeds the {machine.host.gpus_max} GPUs of host {shown(machine.host.name)}")
    loaded = traces.load(trace, limit=limit, seed=seed, skip_bad_rows=skip_bad_rows)
    lengths = loaded.prompt_tokens
    if window is not None:
        first_s, last_s = _window(window)
        arrived_s = loaded.arrival_s - loaded.arrival_s[0]
        lengths = lengths[(arrived_s >= first_s) & (arrived_s < last_s)]
        if not len(lengths):
            raise ValueError(
                f"window={window}: no prompt of {loaded.name} arrives within; choose one in its {arrived_s[-1]:g} s"
            )
    rank = load_model(model, None if params is None else parse_params(params)).shard(tp)
    rows = compare(
        lengths.tolist(),
        batch,
        bounded_tokens("chunk", chunk),
        PlanTable(Full(), rank, machine, {}),
        Clock(rank, machine),
    )
    if json:
        print_json(
            {"prompts": len(lengths), "prompt_tokens": int(lengths.sum()), "schemes": [row._asdict() for row in rows]}
        )
        return
    print_line(f"{len(lengths):,} prompts of {format_count(int(lengths.sum()))} tokens, one rank")
    headings = ["passes", "tokens run", "padding", "FLOPs", "of attention", "time", "prompt tokens/s"]
    columns: Columns = {"batches": "left", **dict.fromkeys(headings, "right")}
    print_table(
        columns,
        (
            [
                row.scheme,
                f"{row.forwards:,}",
                format_count(row.tokens),
                f"{row.padding_share:.1%}",
                f"{row.flops:.3g}",
                f"{row.attention_flops:.3g}",
                format_s(row.seconds),
                format_count(round(int(lengths.sum()) / row.seconds)),
            ]
            for row in rows
        ),
    )


def _window(text: str) -> tuple[float, float]:
    ends = [parse_duration_s(part) for part in text.split("-")]
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise ValueError(f"window={shown(text)} goes from one time to a later one, such as 0s-60s")
    return ends[0], ends[1]
