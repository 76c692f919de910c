"""`kvsim explain --pp`: what a pipeline of stages holds, and how fast it is."""

import json as jsonlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from kvsim.cli.output import SCHEMA_VERSION, print_line, print_table
from kvsim.text.units import format_bytes, format_count, format_s

if TYPE_CHECKING:
    from policies import ModelShape


def print_pipeline(
    model: "ModelShape",
    gpu: str,
    host: str,
    contexts: Sequence[int],
    micro_batches: int,
    batch: int | None,
    options: dict[str, Any],
    *,
    json: bool,
) -> None:
    """Print one row for each context."""
    from kvsim.explain.pipeline import Pipelined
    from kvsim.hardware.catalogue import load_gpu, load_host

    pipelined = Pipelined(model, load_gpu(gpu), load_host(host), **options)
    if pipelined.misfit:
        print_line(f"note: {pipelined.misfit}", err=True)
    rows = [pipelined.costs(tokens, micro_batches, batch) for tokens in contexts]
    if json:
        head = {"schema_version": SCHEMA_VERSION, "pp": pipelined.pp, "tp": pipelined.tp}
        typer.echo(jsonlib.dumps([head | asdict(row) for row in rows], indent=2, allow_nan=False))
        return
    headings = ["layers", "weights", "KV", "fit", "prefill", "idle", "decode/token", "batch", "TPOT", "tokens/s"]
    print_table(
        {"context": "right", **dict.fromkeys(headings, "right")},
        (
            [
                format_count(row.context_tokens),
                "+".join(map(str, row.layers)),
                format_bytes(max(row.weight_bytes)),
                format_bytes(max(row.kv_bytes)),
                f"{row.concurrency:,}",
                format_s(row.prefill_s),
                f"{row.prefill_idle_share:.1%}",
                format_s(row.decode_s_per_token),
                f"{row.batch:,}",
                "does not fit" if row.tpot_s is None else format_s(row.tpot_s),
                "" if row.output_tokens_per_s is None else f"{row.output_tokens_per_s:.4g}",
            ]
            for row in rows
        ),
    )
