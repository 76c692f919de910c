"""`kvsim explain`: what a long context costs under each policy, and the plan that says why."""

import json as jsonlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.model import ParamsOption
from kvsim.cli.output import SCHEMA_VERSION, Columns, JsonFlag, print_line, print_rich, print_table
from kvsim.cli.prefill import print_density, print_occupancy, print_schemes
from kvsim.scenario.choices import ENGINES
from kvsim.scenario.shares import parse_shares
from kvsim.text.names import unknown_name
from kvsim.text.units import bounded_tokens, format_bytes, format_count, format_s, parse_params
from policies.shown import shown

if TYPE_CHECKING:
    from kvsim.explain.costs import Costs
    from policies import ModelShape

PLAN_OPTIONS = ("plan", "model", "context", "kv_dtype", "weight_dtype", "params")
PAPER_OPTIONS = (
    "paper",
    "model",
    "gpu",
    "context",
    "policy",
    "batch",
    "tp",
    "kv_dtype",
    "weight_dtype",
    "params",
    "json",
)
SP_OPTIONS = ("sp", "model", "gpu", "host", "context", "kv_dtype", "weight_dtype", "params", "json")
PP_OPTIONS = ("pp", "micro_batches", "tp", "batch", "engine", "gpu_memory_utilization", *SP_OPTIONS[1:])
OCCUPANCY_OPTIONS = ("occupancy", "batch", "tp", *SP_OPTIONS[1:])
DENSITY_OPTIONS = ("density", "policy", "counts", *SP_OPTIONS[1:])
BATCH_COLUMNS = ("batch", "output_tokens_per_s")
SPECULATION_COLUMNS = ("tokens_per_step",)


def explain(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="A name of the catalogue, a config.json's path, or ORG/NAME of the local Hugging Face cache.",
        ),
    ] = ("llama-3.1-8b"),
    context: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens held: 4k,50k,128Ki.")] = "32k",
    gpu: Annotated[str, typer.Option(metavar="GPU", help="A GPU of the catalogue or a YAML file.")] = "a100-80g-sxm",
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="POLICY", help="name or name:key=value,...; repeat it. Default: every policy."),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The closed form of arXiv:2405.08944, of the policy full alone.")
    ] = False,
    plan: Annotated[
        str | None, typer.Option(metavar="POLICY", help="Print this policy's plan instead of costs.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="max|N", help="Add the throughput of N sequences, or of as many as fit.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs that share every layer.")] = 1,
    sp: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Compare the ways to prefill one prompt split over N GPUs instead."),
    ] = None,
    pp: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Price the dense cache on a pipeline of N stages instead."),
    ] = None,
    micro_batches: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Chunks of a prompt in that pipeline. Default: N stages.")
    ] = None,
    occupancy: Annotated[
        bool, typer.Option("--occupancy", help="How attention kernels fill the SMs in prefill and decode instead.")
    ] = False,
    density: Annotated[
        bool, typer.Option("--density", help="What sparse policies compute of a prompt's prefill instead.")
    ] = False,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="A host of the catalogue or a YAML file.")
    ] = "ddr5-dual-xeon",
    kv_dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Of cached keys and values.")] = None,
    weight_dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="Of the weights.")] = None,
    params: ParamsOption = None,
    engine: Annotated[
        str, typer.Option(metavar="|".join(ENGINES), help="Whose memory beside weights and KV is set aside.")
    ] = "vllm",
    gpu_memory_utilization: Annotated[
        float, typer.Option(metavar="SHARE", help="What an engine may use of HBM.")
    ] = 0.9,
    counts: Annotated[
        str | None,
        typer.Option(metavar="NAME=SHARE,...|FILE", help="What data decide, as shares of its maximum, or a recording."),
    ] = None,
    speculate: Annotated[
        int | None, typer.Option(metavar="K", help="Guess K tokens ahead and verify them in one step.")
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
    json: JsonFlag = False,
) -> None:
    """Compare what a long context costs under each policy: memory, prefill, decode, and switching between sequences."""
    from kvsim.models import load_model
    from kvsim.scenario.speculation import parse_acceptance, speculation

    contexts = [bounded_tokens("context", part) for part in context.split(",")]
    shape = load_model(model, None if params is None else parse_params(params)).stored_as(weight_dtype, kv_dtype)
    for note in shape.notes:
        _warn(f"note: {note}")
    if plan is not None:
        _refuse_others(ctx, "--plan", PLAN_OPTIONS)
        for tokens in contexts:
            _print_plan(plan, shape, tokens)
        return
    if occupancy:
        _refuse_others(ctx, "--occupancy", OCCUPANCY_OPTIONS)
        if batch == "max":
            raise ValueError("--occupancy takes a number of sequences for --batch, not max")
        print_occupancy(shape.shard(tp), gpu, host, contexts, _batch(batch or "1"), json=json)
        return
    if density:
        _refuse_others(ctx, "--density", DENSITY_OPTIONS)
        shares = parse_shares([counts]) if counts is not None else {}
        print_density(policy, shape, (gpu, host), contexts, shares, json=json)
        return
    for tokens in contexts:
        if tokens > shape.max_positions:
            _warn(f"warning: {tokens:,} tokens are beyond the {shape.max_positions:,} positions of {shape.name}")
    if sp is not None:
        _refuse_others(ctx, "--sp", SP_OPTIONS)
        print_schemes(shape, gpu, host, contexts, sp, json=json)
        return
    size = None if batch in (None, "max") else _batch(batch or "")
    if pp is not None:
        from kvsim.cli.pipeline import print_pipeline

        _refuse_others(ctx, "--pp", PP_OPTIONS)
        options: dict[str, Any] = {"pp": pp, "tp": tp, "utilization": gpu_memory_utilization, "engine": engine}
        print_pipeline(shape, gpu, host, contexts, micro_batches or pp, size, options, json=json)
        return
    if micro_batches is not None:
        raise ValueError("--micro-batches is of --pp; give that too, or leave it out")
    if paper:
        _refuse_others(ctx, "--paper", PAPER_OPTIONS)
        rows = _paper_rows(policy or ["full"], shape, gpu, contexts, tp, size)
    else:
        guesses = speculation(shape, speculate, parse_acceptance(acceptance or ""), tree, draft, draft_share)
        options = {"tp": tp, "utilization": gpu_memory_utilization, "engine": engine, "speculation": guesses}
        rows = list(
            _rows(
                policy, shape, gpu, host, contexts, size, options, parse_shares([counts]) if counts is not None else {}
            )
        )
    left_out = (*(BATCH_COLUMNS if batch is None else ()), *(SPECULATION_COLUMNS if speculate is None else ()))
    _print(rows, left_out, json=json)


def _paper_rows(
    names: Sequence[str], model: "ModelShape", gpu: str, contexts: Sequence[int], tp: int, batch: int | None
) -> list[tuple[str, "Costs"]]:
    from kvsim.explain.costs import paper_costs
    from kvsim.explain.fit import misfit
    from kvsim.hardware.catalogue import load_gpu

    for name in names:
        if name != "full":
            raise ValueError(
                f"--paper prices the policy full alone, not {shown(name)}; leave --paper or the policy out"
            )
    card = load_gpu(gpu if "@" in gpu else f"{gpu}@datasheet")
    # As the paper counts, an engine may use all of the memory, and one copy lies on all GPUs together.
    if note := misfit(model.name, card, tp, -(-model.weight_bytes // tp)):
        _warn(f"note: {note}")
    return [("full", paper_costs(model, card, tokens, tp=tp, batch=batch)) for tokens in contexts]


def _rows(
    names: Sequence[str] | None,
    model: "ModelShape",
    gpu: str,
    host: str,
    contexts: Sequence[int],
    batch: int | None,
    options: dict[str, Any],
    shares: dict[str, float],
) -> Iterator[tuple[str, "Costs"]]:
    from kvsim.explain.costs import Explainer
    from kvsim.hardware.catalogue import load_gpu, load_host
    from policies import POLICIES, parse_policy

    card, server = load_gpu(gpu), load_host(host)
    for note in card.notes:
        _warn(f"note: {note}")
    drawn: set[str] = set()
    misfits: dict[str, None] = {}
    known = [name for name, kind in POLICIES.items() if kind.verifies or options["speculation"] is None]
    for name in names or known:
        explainer = Explainer(parse_policy(name), model, card, server, shares=shares, **options)
        try:
            priced = [explainer.costs(tokens, batch) for tokens in contexts]
        except ValueError as error:
            if names:
                raise
            _warn(f"note: {name} is left out: {error}")
            continue
        drawn |= explainer.table.drawn
        if explainer.misfit is not None and explainer.misfit not in misfits:
            misfits[explainer.misfit] = None
            _warn(f"note: {explainer.misfit}")
        for costs in priced:
            if explainer.misfit is None and not costs.concurrency:
                _warn(f"note: {name} at {costs.context_tokens:,} tokens: not one sequence fits beside the weights")
        yield from ((name, costs) for costs in priced)
    for name in shares:
        if name not in drawn:
            raise unknown_name("count", name, sorted(drawn))


def _print(rows: Sequence[tuple[str, "Costs"]], left_out: Sequence[str], *, json: bool) -> None:
    with_batch = "batch" not in left_out
    for name, costs in rows:
        if with_batch and costs.output_tokens_per_s is None:
            _warn(f"note: {name} at {costs.context_tokens:,} tokens: {costs.concurrency} fit, not {costs.batch}")
    if json:
        shown = [
            {"schema_version": SCHEMA_VERSION, "policy": name}
            | {key: value for key, value in asdict(costs).items() if key not in left_out}
            for name, costs in rows
        ]
        typer.echo(jsonlib.dumps(shown, indent=2, allow_nan=False))
        return
    headings = ["context", "KV", "HBM", "DDR", "fit", "prefill", "decode/token", "switch"]
    columns: Columns = {"policy": "left", **dict.fromkeys(headings, "right"), "bound by": "left"}
    further = {"batch": "batch", "output_tokens_per_s": "tokens/s", "tokens_per_step": "tokens/step"}
    columns = {**columns, **{heading: "right" for name, heading in further.items() if name not in left_out}}
    print_table(columns, ([name, *_cells(costs, left_out)] for name, costs in rows))


def _cells(costs: "Costs", left_out: Sequence[str]) -> list[str]:
    rate = costs.output_tokens_per_s
    cells = [
        format_count(costs.context_tokens),
        format_bytes(costs.kv_bytes),
        format_bytes(costs.hbm_bytes),
        format_bytes(costs.ddr_bytes),
        f"{costs.concurrency:,}",
        format_s(costs.prefill_s),
        format_s(costs.decode_s_per_token),
        format_s(costs.context_switch_s),
        costs.bound_by,
    ]
    further = {
        "batch": f"{costs.batch:,}",
        "output_tokens_per_s": "does not fit" if rate is None else f"{rate:.4g}",
        "tokens_per_step": f"{costs.tokens_per_step:.3g}",
    }
    return cells + [cell for name, cell in further.items() if name not in left_out]


def _print_plan(text: str, model: "ModelShape", tokens: int) -> None:
    """Print the plans of the chunk that completes a prompt and of a decode step, once for all layers alike."""
    from kvsim.plans.plan_tree import plan_tree
    from policies import LayerPlan, Step, parse_policy, plan_layer

    policy = parse_policy(text)
    steps = {
        f"the whole prompt of {tokens:,} tokens": Step(prompt_tokens=tokens, past_tokens=0, new_tokens=tokens),
        f"one decode step after {tokens:,} tokens": Step.decoding(tokens, 1),
    }
    for title, step in steps.items():
        alike: dict[LayerPlan, list[int]] = {}
        for layer in range(model.n_layers):
            alike.setdefault(plan_layer(policy, model, step, layer), []).append(layer)
        for layers in alike.values():
            print_line(f"{model.name}, {title}, {len(layers)} of {model.n_layers} layers, from layer {layers[0]}:")
            print_rich(plan_tree(policy, model, step, layers[0]))


def _refuse_others(ctx: typer.Context, mode: str, used: Sequence[str]) -> None:
    for name in ctx.params:
        source = ctx.get_parameter_source(name)
        if name not in used and source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"{mode} has no use for --{name.replace('_', '-')}; leave it out")


def _batch(text: str) -> int:
    size = bounded_tokens("batch", text)
    if size < 1:
        raise ValueError(f"--batch {text} must be max or at least 1")
    return size


def _warn(text: str) -> None:
    print_line(text, err=True)
