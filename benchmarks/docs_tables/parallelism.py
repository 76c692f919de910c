"""Prompts and decoding apart, pipelines, and the room that stages leave: the tables of docs/measured/parallelism.md."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

import traces
from benchmarks.docs_tables.markdown import holding, paragraph, table
from benchmarks.docs_tables.runs import summary, written_by
from kvsim import Setup, default_host, load_gpu, load_host, load_model, simulate, summarize
from policies import Full

APART = {"model": "llama-3.1-8b", "gpu": "h100-sxm", "gpus": 8, "router": "least-loaded"}
SLO = {"ttft": "5s", "tpot": "50ms"}
LOADS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("`mooncake-conversation`, 1,500 requests", {"trace": "mooncake-conversation", "limit": 1500}),
    ("`azure-2023-code`, 4,000 requests, 8x the rate", {"trace": "azure-2023-code", "limit": 4000, "rate_scale": 8}),
)
PREFILL_GPUS = (None, 2, 4, 5, 6)
SPLITS = ((4, 1), (2, 2), (1, 4))  # --tp and --pp of four GPUs
REQUESTS, OUTPUTS, SEED = 60, (1, 200), 0
PROMPTS = {"8,192 tokens": (8192, 8192), "500 to 30,000 tokens": (500, 30_000)}
ROOMS = ((8, 1), (4, 2), (2, 4), (1, 8))


def measure(limit: int | None) -> dict[str, Any]:
    """The rows of the three tables."""
    apart = [
        {"load": load, "prefill_gpus": n, **_figures(_run(trace, n, limit))}
        for load, trace in LOADS
        for n in PREFILL_GPUS
    ]
    base = Setup(
        model=load_model("llama-3.1-70b"),
        policy=Full(),
        gpu=load_gpu("h100-sxm"),
        host=load_host(default_host("h100-sxm")),
        gpus=4,
        tp=4,
    )
    stages = [
        {
            "prompts": prompts,
            "outputs": outputs,
            "makespan_s": [
                summarize(simulate(_at_once(prompts, outputs, limit), replace(base, tp=tp, pp=pp)))["makespan_s"]
                for tp, pp in SPLITS
            ],
        }
        for prompts, outputs in product(PROMPTS, OUTPUTS)
    ]
    model, gpu = load_model("deepseek-v3"), load_gpu("h200-sxm")
    host = load_host(default_host("h200-sxm"))
    rooms = [
        Setup(model=model, policy=Full(), gpu=gpu, host=host, gpus=8, tp=tp, pp=pp).capacity()[0] for tp, pp in ROOMS
    ]
    return {"apart": apart, "stages": stages, "room_tokens": [room // model.kv_bytes_per_token for room in rooms]}


def _run(trace: dict[str, Any], prefill_gpus: int | None, limit: int | None) -> dict[str, Any]:
    apart = {} if prefill_gpus is None else {"prefill_gpus": prefill_gpus}
    return summary({**APART, **trace, **apart, "slo": SLO}, limit)


def _figures(run: dict[str, Any]) -> dict[str, float]:
    times = {f"{name}_{p}_s": run[f"{name}_s"][p] for name in ("ttft", "tpot") for p in ("p50", "p99")}
    return {**times, "goodput_rps": run["goodput_rps"]}


def _at_once(prompts: str, outputs: int, limit: int | None) -> traces.Trace:
    """Requests that all come at the start, of prompts drawn evenly between two lengths."""
    n, (least, most) = min(REQUESTS, limit or REQUESTS), PROMPTS[prompts]
    lengths = np.random.default_rng(SEED).integers(least, most, n, endpoint=True)
    return traces.Trace.from_columns(
        name="at-once", arrival_s=np.zeros(n), prompt_tokens=lengths, output_tokens=np.full(n, outputs)
    )


def page(result: dict[str, Any]) -> str:
    """Each table under its heading."""
    apart = {(row["load"], row["prefill_gpus"]): row for row in result["apart"]}
    gains = [
        apart[load, None]["tpot_p99_s"] / apart[load, n]["tpot_p99_s"] for load, _ in LOADS for n in PREFILL_GPUS[2:]
    ]
    waits = [(apart[load, 2]["ttft_p50_s"], apart[load, None]["ttft_p50_s"]) for load, _ in LOADS]
    stages = {(row["prompts"], row["outputs"]): row["makespan_s"] for row in result["stages"]}
    return (
        "# Several GPUs, measured\n\n"
        + paragraph(written_by("parallelism", result), "What the options mean: `docs/parallelism.md`.")
        + "\n## Prompts and decoding apart\n\n"
        + paragraph(
            "Eight H100, Llama-3.1-8B, `full`, `--router least-loaded`; goodput counts requests within 5 s of TTFT and "
            "50 ms of TPOT.",
        )
        + "\n"
        + table(
            ("trace", "prefill GPUs", "TTFT p50 / p99", "TPOT p50 / p99", "goodput"),
            [
                [
                    row["load"] if row["prefill_gpus"] is None else "",
                    str(row["prefill_gpus"] or "none: all do both"),
                    f"{row['ttft_p50_s']:.2f} / {row['ttft_p99_s']:.2f} s",
                    f"{1e3 * row['tpot_p50_s']:.1f} / {1e3 * row['tpot_p99_s']:.1f} ms",
                    f"{row['goodput_rps']:.3g} /s",
                ]
                for row in result["apart"]
            ],
            left=2,
        )
        + "\n"
        + paragraph(
            *holding(
                (
                    min(gains) > 2,
                    (
                        "Chunks of prompts no longer sit between tokens, so from four GPUs for prompts on the tail of "
                        f"TPOT falls by a factor of {min(gains):.0f} to {max(gains):.0f}."
                    ),
                ),
                (
                    all(few > 2 * both for few, both in waits),
                    (
                        "TTFT pays where too few GPUs are left for prompts: with two of eight its median is "
                        f"{' and '.join(f'{few:.1f} s' for few, _ in waits)}."
                    ),
                ),
            ),
        )
        + "\n## Pipelines\n\n"
        + paragraph(
            f"{REQUESTS} requests at once, Llama-3.1-70B on four H100, `full`; seconds until the last is done. Lengths "
            f"are drawn evenly (seed {SEED}).",
        )
        + "\n"
        + table(
            ("prompts", "outputs", *(f"`--tp {tp}`" + f" `--pp {pp}`" * (pp > 1) for tp, pp in SPLITS)),
            [
                [row["prompts"], str(row["outputs"]), *(f"{seconds:.1f}" for seconds in row["makespan_s"])]
                for row in result["stages"]
            ],
        )
        + "\n"
        + paragraph(
            *holding(
                (
                    all(whole > staged for of in PROMPTS for whole, *rest in [stages[of, 1]] for staged in rest),
                    "Stages send less than all-reduces do, so prompts alone are done sooner.",
                ),
                (
                    all(stages[of, OUTPUTS[-1]][0] < stages[of, OUTPUTS[-1]][-1] for of in PROMPTS),
                    (
                        "Each micro-batch of decode steps reads its stage's weights anew, so with long outputs four "
                        "stages take longer than four ranks."
                    ),
                ),
            ),
        )
        + "\n## Room for latents\n\n"
        + paragraph(
            "An MLA latent is whole on each of `tp` ranks, and stages divide it. Tokens of DeepSeek-V3 for which eight "
            "H200 have room:",
        )
        + "\n"
        + table(
            [f"`--tp {tp}`" + f" `--pp {pp}`" * (pp > 1) for tp, pp in ROOMS],
            [[f"{tokens:,}" for tokens in result["room_tokens"]]],
            left=0,
        )
    )
