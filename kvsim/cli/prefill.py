"""`kvsim explain --sp`, `--occupancy`, `--density`: a prompt over GPUs, attention on SMs, what is left out of it."""

import json as jsonlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import typer

from kvsim.cli.output import SCHEMA_VERSION, print_line, print_table
from kvsim.text.units import format_bytes, format_count, format_s
from policies.shown import shown

if TYPE_CHECKING:
    from policies import ModelShape

MOST_OCCUPYING = 1 << 27
SPARSE = ("xattention", "hip", "lazyllm")  # what leaves something out of a prompt by itself


def print_occupancy(
    model: "ModelShape", gpu: str, host: str, contexts: Sequence[int], batch: int, *, json: bool
) -> None:
    """One row for each context, phase and kernel: a layer's blocks on the SMs of one rank, and their time."""
    from kvsim.explain.occupancy import KERNELS, Attention
    from kvsim.hardware.catalogue import load_gpu, load_host
    from kvsim.hardware.machine import Machine

    layer = next((shape for shape in model.layers if shape.kind == "full"), None)
    if layer is None:
        raise ValueError(f"{model.name} has no layer of full attention, whose blocks could be counted")
    machine = Machine(gpu=load_gpu(gpu), host=load_host(host))
    if batch * max(contexts) > MOST_OCCUPYING:
        raise ValueError(
            f"--batch {batch} of {max(contexts):,} tokens each: blocks are counted one by one, for at most "
            f"{MOST_OCCUPYING:,} tokens together; lower one of them"
        )
    rows: list[dict[str, Any]] = []
    for tokens in contexts:
        for phase, queries in (("prefill", tokens), ("decode", 1)):
            attention = Attention(
                layer=layer, query_tokens=queries, key_tokens=(tokens,) * batch, kv_dtype=model.kv_dtype
            )
            for kernel in KERNELS.values():
                launch = kernel(attention, machine)
                rows.append(
                    {
                        "schema_version": SCHEMA_VERSION,
                        "context_tokens": tokens,
                        "batch": batch,
                        "phase": phase,
                        **asdict(launch),
                        "waves": launch.waves,
                        "efficiency": launch.efficiency,
                    }
                )
    if json:
        print_rows(rows)
        return
    headings = ["blocks", "splits", "waves", "SMs busy", "time of a layer"]
    print_table(
        {"context": "right", "phase": "left", "kernel": "left", **dict.fromkeys(headings, "right")},
        (
            [
                format_count(row["context_tokens"]),
                row["phase"],
                row["kernel"],
                *(f"{row[name]:,}" for name in ("blocks", "splits", "waves")),
                f"{row['efficiency']:.1%}",
                format_s(row["seconds"]),
            ]
            for row in rows
        ),
    )


def print_density(
    names: Sequence[str] | None,
    model: "ModelShape",
    hardware: tuple[str, str],
    contexts: Sequence[int],
    shares: dict[str, float],
    *,
    json: bool,
) -> None:
    """One row for each policy and context: what its prefill computes, of what a dense one does; on a GPU and host."""
    from kvsim.explain.density import density, drawn_counts
    from kvsim.hardware.catalogue import load_gpu, load_host
    from kvsim.hardware.machine import Machine
    from kvsim.text.names import unknown_name
    from policies import parse_policy

    machine = Machine(gpu=load_gpu(hardware[0]), host=load_host(hardware[1]))
    policies = {name: parse_policy(name) for name in names or SPARSE}
    known = {
        name for policy in policies.values() for tokens in contexts for name in drawn_counts(policy, model, tokens)
    }
    for name in shares:
        if name not in known:
            raise unknown_name("count", name, sorted(known))
    found = [
        (name, density(policy, model, tokens, machine, shares))
        for name, policy in policies.items()
        for tokens in contexts
    ]
    if json:
        print_rows([{"schema_version": SCHEMA_VERSION, "policy": name, **asdict(row)} for name, row in found])
        return
    headings = ["context", "density", "choosing", "attention", "read", "tokens by layers", "all FLOPs"]
    print_table(
        {"policy": "left", **dict.fromkeys(headings, "right")},
        (
            [
                name,
                format_count(row.context_tokens),
                f"{row.attention_share:.2%}",
                f"{row.choosing_share:.2%}",
                f"{row.attention_speedup:.3g}x",
                f"{format_bytes(row.read_bytes)} of {format_bytes(row.dense_read_bytes)}",
                _by_layers(row.computed_tokens),
                f"{row.whole_share:.1%}",
            ]
            for name, row in found
        ),
    )


def _by_layers(tokens: Sequence[int]) -> str:
    """Tokens of runs of equal layers: `8 x 8,000, 24 x 6,000`."""
    runs = ((len(list(same)), value) for value, same in groupby(tokens))
    return ", ".join(f"{layers} x {value:,}" for layers, value in runs)


def print_schemes(
    model: "ModelShape", gpu: str, host: str, contexts: Sequence[int], devices: int, *, json: bool
) -> None:
    """For each scheme and context what the busiest device sends for all layers, and the time of the whole prefill."""
    from kvsim.explain.sequence_parallel import VOLUMES, Split, prefill_s, volume
    from kvsim.hardware.catalogue import load_gpu, load_host
    from kvsim.hardware.machine import Machine

    card, server = load_gpu(gpu), load_host(host)
    if devices > server.gpus_max:
        raise ValueError(f"--sp {devices} does not fit host {shown(server.name)}; it takes 1 to {server.gpus_max} GPUs")
    machine = Machine(gpu=card, host=server)
    rows: list[dict[str, Any]] = []
    for tokens in contexts:
        for scheme in VOLUMES:
            try:
                seconds = prefill_s(model, machine, tokens, devices, scheme)
                sent = [volume(scheme, Split(layer, tokens, devices, model.kv_dtype)) for layer in model.layers]
            except ValueError as error:
                print_line(f"note: {scheme} is left out: {error}", err=True)
                continue
            rows.append(
                {
                    "schema_version": SCHEMA_VERSION,
                    "scheme": scheme,
                    "devices": devices,
                    "context_tokens": tokens,
                    "forward_bytes": sum(v.forward_bytes for v in sent),
                    "backward_bytes": sum(v.backward_bytes for v in sent),
                    "buffer_bytes": max(v.buffer_bytes for v in sent),
                    "prefill_s": seconds,
                }
            )
    if json:
        print_rows(rows)
        return
    headings = ["context", "sent forward", "sent back", "received at a time", "prefill"]
    print_table(
        {"scheme": "left", **dict.fromkeys(headings, "right")},
        (
            [
                row["scheme"],
                format_count(row["context_tokens"]),
                *(format_bytes(row[f"{name}_bytes"]) for name in ("forward", "backward", "buffer")),
                format_s(row["prefill_s"]),
            ]
            for row in rows
        ),
    )


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as JSON, a list of objects."""
    typer.echo(jsonlib.dumps(rows, indent=2, allow_nan=False))
