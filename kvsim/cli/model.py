"""`kvsim model`: the catalogue of model shapes, and what any `config.json` weighs and caches."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from kvsim.cli.extras import require_runtime
from kvsim.cli.output import JsonFlag, print_facts, print_json, print_line, print_table
from kvsim.text.units import format_bytes, format_count, parse_params, parse_tokens
from policies.model import LayerShape, ModelShape

ParamsOption = Annotated[
    str | None,
    typer.Option(metavar="N", help="State the weights, as 8B, of an architecture that the table of families lacks."),
]
SHOWN_CONTEXTS = ("4Ki", "32Ki", "128Ki", "1Mi")

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_models(json: JsonFlag = False) -> None:
    """List the models of the catalogue."""
    from kvsim.models import load_model, model_names

    models = [load_model(name) for name in model_names()]
    if json:
        print_json({"models": [_summary(model) for model in models]})
        return
    rows = (
        (
            model.name,
            format_count(model.params),
            format_count(model.active_params),
            str(model.n_layers),
            f"{model.kv_bytes_per_token:,}",
            f"{model.max_positions:,}",
        )
        for model in models
    )
    columns = ("parameters", "active", "layers", "KV bytes per token", "positions")
    print_table({"model": "left", **dict.fromkeys(columns, "right")}, rows)


@app.command("show")
def show_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A name of the catalogue, a config.json's path, or ORG/NAME of the local Hugging Face cache.",
        ),
    ],
    params: ParamsOption = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Count the weights of the model that Transformers builds, without loading any."),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Show a model's layers, weights and KV-cache sizes, and where their number is from."""
    from kvsim.models import load_model, model_source

    if exact and params is not None:
        raise ValueError("--exact counts the weights and --params states them; give one of them")
    shape = _counted(model) if exact else load_model(model, None if params is None else parse_params(params))
    kv_bytes = {context: shape.kv_bytes(parse_tokens(context)) for context in SHOWN_CONTEXTS}
    groups = [{"layers": count, **dict(group)} for group, count in Counter(map(_group, shape.layers)).items()]
    if json:
        by_tokens = {parse_tokens(context): size for context, size in kv_bytes.items()}
        print_json({**_summary(shape), "kv_bytes": by_tokens, "layer_groups": groups})
        return
    facts = {
        "parameters": f"{shape.params:,}, {format_count(shape.active_params)} of them active per token",
        "counted": shape.source,
        "other parameters": f"{shape.other_params:,}, of towers beside the language model"
        if shape.other_params
        else "",
        "multi-token prediction": f"{shape.predictor_params:,} parameters more, not counted"
        if shape.predictor_params
        else "",
        "weights": f"{format_bytes(shape.weight_bytes)} in {_stored(shape)}",
        "hidden size": f"{shape.hidden_dim:,}",
        "vocabulary": f"{shape.vocab_size:,}",
        "positions": f"{shape.max_positions:,}",
        "KV bytes per token": f"{shape.kv_bytes_per_token:,} in {shape.kv_dtype}, once all windows are full",
    }
    facts |= {f"KV at {context} tokens": format_bytes(size) for context, size in kv_bytes.items()}
    if shape.notes:
        facts["note"] = "; ".join(shape.notes)
    if source := model_source(model):
        facts["source"] = source
    print_facts(shape.name, {name: fact for name, fact in facts.items() if fact})
    used = [name for name in groups[0] if any(group[name] for group in groups)]
    rows = ([str(group[name]) for name in used] for group in groups)
    print_table(dict.fromkeys((name.replace("_", " ") for name in used), "right"), rows)


@app.command("families")
def list_families(json: JsonFlag = False) -> None:
    """List the architectures (`model_type`) whose config.json is read."""
    from policies.hf.families import table

    rows = table()
    if json:
        print_json({"families": rows})
        return
    print_table(dict.fromkeys(rows[0], "left"), (list(row.values()) for row in rows))


@app.command("needle")
def unpack_needle(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put it; made when it does not exist.")],
) -> None:
    """Unpack needle-28m, the trained long-context model that comes with kvsim, as a Hugging Face folder."""
    require_runtime()
    from runtime.needle import expand

    print_line(f"needle-28m is in {expand(folder)}")


def _counted(model: str) -> ModelShape:
    """The model with the weights that Transformers counts, which have to be those of the table where that knows it."""
    require_runtime()
    from kvsim.models import load_config, load_model
    from policies.hf import read
    from policies.hf.families import FAMILIES
    from policies.hf.wrappers import unwrap
    from runtime.counting import count_weights

    config, name = load_config(model)
    counted = count_weights({key: value for key, value in config.items() if not key.startswith("_")})
    if unwrap(config, name).model_type not in FAMILIES:
        shape = read(counted.keys, name, params=counted.params, counted_by=counted.by)
    else:
        shape = load_model(model)
        gap = counted.params - shape.params
        agrees = "the same" if not gap else f"{counted.params:,}, {gap:+,}"
        shape = replace(shape, params=counted.params, source=f"{shape.source}; counted by {counted.by}: {agrees}")
    return replace(
        shape, other_params=counted.other_params, notes=tuple(n for n in shape.notes if "not counted" not in n)
    )


def _stored(model: ModelShape) -> str:
    """The dtype of the weights, or of each part where they differ."""
    dtypes = model.stored_dtypes
    if len(set(dtypes.values())) == 1:
        return model.weight_dtype
    return ", ".join(f"{dtype} ({part})" for part, dtype in dtypes.items())


def _summary(model: ModelShape) -> dict[str, Any]:
    return {
        "name": model.name,
        "params": model.params,
        "params_source": model.source,
        "other_params": model.other_params,
        "predictor_params": model.predictor_params,
        "notes": list(model.notes),
        "active_params": model.active_params,
        "weight_bytes": model.weight_bytes,
        "weight_dtype": model.weight_dtype,
        "weight_dtypes": model.stored_dtypes,
        "kv_dtype": model.kv_dtype,
        "n_layers": model.n_layers,
        "hidden_dim": model.hidden_dim,
        "vocab_size": model.vocab_size,
        "max_positions": model.max_positions,
        "kv_bytes_per_token": model.kv_bytes_per_token,
    }


def _group(layer: LayerShape) -> tuple[tuple[str, str | int], ...]:
    """What tells groups of like layers apart, as (name, value) pairs."""
    names = ("kind", "heads", "kv_heads", "head_dim", "window_tokens", "latent_dim", "state_elements", "block_tokens")
    routing = ("experts", "experts_per_token")
    return tuple((name, getattr(layer, name)) for name in (*names, *routing))
