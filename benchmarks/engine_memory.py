"""Room for KV against what engines log: `python benchmarks/engine_memory.py`, in a second.

Reads benchmarks/engine_logs.json, figures from published logs of vLLM and SGLang with their sources, fits the bytes of
a logit to the activations of models that no other row has, and writes the errors of capacities to
benchmarks/results/engine_memory.json and docs/measured/engine_memory.md.
"""

import json
import textwrap
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from kvsim import Setup, load_gpu, load_host, load_model
from kvsim.scenario.engine_memory import ENGINE_MEMORY, GIB, activation_bytes
from policies import parse_policy

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "benchmarks" / "engine_logs.json"
RESULTS = ROOT / "benchmarks" / "results" / "engine_memory.json"
PAGE = ROOT / "docs" / "measured" / "engine_memory.md"
TOKENS, SEQUENCES = 8192, 1024  # of the runs that activations were logged in


def activation_gib(row: dict[str, Any], logit_bytes: float) -> float:
    """The modelled peak of a pass through a model of dense layers."""
    layer = replace(load_model("llama-3.1-8b").layers[0], mlp_params=row["mlp_params"])
    layer = replace(layer, mlp_active_params=row["mlp_params"])
    shape = replace(load_model("llama-3.1-8b"), hidden_dim=row["hidden_dim"], layers=(layer,))
    return activation_bytes(shape, TOKENS, round(logit_bytes * row["vocab_size"] * SEQUENCES)) / GIB


def fitted_logit_bytes(rows: list[dict[str, Any]]) -> float:
    """Bytes of a logit, to a tenth, with the least sum of absolute relative errors."""
    tried = [i / 10 for i in range(80, 401)]
    return min(tried, key=lambda x: sum(abs(activation_gib(row, x) / row["gib"] - 1) for row in rows))


def setup_of(row: dict[str, Any]) -> Setup:
    """The run as a simulation has it, on a device that reports what the log says."""
    gpu = replace(load_gpu(row["gpu"]), device_bytes=None, memory_bytes=round(row["device_gib"] * GIB))
    model = load_model(row["model"]).stored_as(row.get("weight_dtype"), None)
    return Setup(
        model=model,
        policy=parse_policy("full"),
        gpu=gpu,
        host=load_host("ddr5-dual-xeon"),
        gpus=row["tp"],
        tp=row["tp"],
        engine=row["engine"],
        gpu_memory_utilization=row["utilization"],
        max_num_batched_tokens=row["tokens"],
        max_num_seqs=row["sequences"],
    )


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the capacity that is computed for it; graphs are given back where the version did not count them."""
    setup = setup_of(row)
    token_bytes = setup.rank.kv_bytes_per_token
    given_back = 0 if row.get("graphs", True) else ENGINE_MEMORY[row["engine"]].graphs_bytes
    own = setup.capacity()[0] + given_back
    logged = row["kv_gib"] * GIB if "kv_gib" in row else row["kv_tokens"] * token_bytes
    before = int(setup.gpu.memory_bytes * row["utilization"]) - setup.rank.weight_bytes
    return row | {
        "computed_gib": own / GIB,
        "computed_tokens": own // token_bytes,
        "error": own / logged - 1,
        "error_without_reserve": before / logged - 1,
    }


def record() -> dict[str, Any]:
    """Everything that is compared."""
    logs = json.loads(LOGS.read_text(encoding="utf-8"))
    logit_bytes = fitted_logit_bytes(logs["activations"])
    used = ENGINE_MEMORY["vllm"].logit_bytes
    return {
        "sources": logs["sources"],
        "logit_bytes": {"fitted": logit_bytes, "used": used},
        "activations": [row | {"computed_gib": activation_gib(row, used)} for row in logs["activations"]],
        "capacities": [compared(row) for row in logs["capacities"]],
    }


def page(found: dict[str, Any]) -> str:
    """docs/measured/engine_memory.md."""
    tested = [row for row in found["capacities"] if not row.get("fitted")]
    others = [row for row in tested if row["source"] not in ("planner", "planner-old")]
    mean, without = (_mean_error(others, name) for name in ("error", "error_without_reserve"))
    worst = max(tested, key=lambda row: abs(row["error"]))
    lines = [
        "# Memory that engines leave for KV",
        "",
        _paragraph(
            "Written by `python benchmarks/engine_memory.py` from figures of published logs. How much KV a replica has "
            "room for is what the driver reports of a GPU, times `--gpu-memory-utilization`, less weights and a "
            "reserve by source: the CUDA context, CUDA graphs, communicators and the peak of activations, which "
            "follows from the model, `--max-num-batched-tokens` and `--max-num-seqs` "
            "(`kvsim/scenario/engine_memory.py` has the formula). `--engine` says whose reserve it is: `vllm` is 0.21 "
            "and later (0.17 to 0.20 leave graphs out), `vllm-0.16` what came before, and `sglang` takes the share, "
            "its `mem_fraction_static`, of what is free beside context and communicators, and leaves graphs and "
            "activations the rest. (Its log names the share: 0.85 on the four GPUs below.)"
        ),
        "",
        _paragraph(
            "`--kv-cache-tokens`, `--kv-cache-blocks` and `--kv-cache-memory` state the capacity of an engine at hand, "
            "as its log has it, in place of all that."
        ),
        "",
        "| figure | " + " | ".join(ENGINE_MEMORY) + " |",
        "|---|" + "--:|" * len(ENGINE_MEMORY),
    ]
    for name, label in (
        ("context_bytes", "CUDA context, GiB"),
        ("graphs_bytes", "CUDA graphs, GiB"),
        ("nvlink_bytes", "communicators over NVLink, GiB"),
        ("pcie_bytes", "communicators over PCIe, GiB"),
    ):
        cells = " | ".join(f"{getattr(memory, name) / GIB:.2f}" for memory in ENGINE_MEMORY.values())
        lines.append(f"| {label} | {cells} |")
    cells = " | ".join(f"{memory.logit_bytes:g}" for memory in ENGINE_MEMORY.values())
    lines += [f"| bytes of a logit | {cells} |", ""]
    for engine, memory in ENGINE_MEMORY.items():
        lines += [_paragraph(f"- `{engine}`, {name}: {source}.") for name, source in memory.sources]
    lines += [
        "",
        "## Activations",
        "",
        _paragraph(
            f"The bytes of a logit under `vllm` are fitted to these ({found['logit_bytes']['fitted']:g} is the best), "
            "peaks of models that the capacities below do not have."
        ),
        "",
        "| model | logged, GiB | computed, GiB |",
        "|---|--:|--:|",
    ]
    lines += [f"| {row['model']} | {row['gib']:.2f} | {row['computed_gib']:.2f} |" for row in found["activations"]]
    lines += [
        "",
        "## Capacities",
        "",
        _paragraph(
            f"The mean absolute error over the {len(others)} rows of logs that no figure is from is {mean:.1%} (median "
            f"{median(abs(row['error']) for row in others):.1%}), the worst {worst['error']:+.1%} ({worst['model']}, "
            f"{worst['source']}); with weights alone subtracted the mean is {without:.1%}. The context and "
            "communicators of `vllm` are read off the runs of `planner`, whose rows try the activations alone: "
            f"{_mean_error([row for row in tested if row not in others], 'error'):.1%}. "
            "Communicators over PCIe, 0.2 GiB, are from two of the eight."
        ),
        "",
        "| engine | log | model | GPU | tp | KV logged, GiB | computed | error | without a reserve |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in found["capacities"]:
        logged = row["kv_gib"] if "kv_gib" in row else row["computed_gib"] / (1 + row["error"])
        lines.append(
            f"| {row['engine']} | {row['source']}{' (fitted)' if row.get('fitted') else ''} | {row['model']} | "
            f"{row['gpu']}, {row['device_gib']} GiB | {row['tp']} | {logged:.2f} | {row['computed_gib']:.2f} | "
            f"{row['error']:+.1%} | {row['error_without_reserve']:+.1%} |"
        )
    lines += [
        "",
        _paragraph(
            "A GPU that is not in the catalogue is one of like size with the memory that its log states. Rows with "
            "`planner` and `run2` are of versions that do not count graphs, which is allowed for. Some rows of "
            "`planner` are the sum of the parts that it reports. vLLM of early 2025 with chunked "
            "prefill (`oracle`) did not look at logits when it sized KV, so it left more."
        ),
        "",
        *(_paragraph(f"- {name}: {source}.") for name, source in found["sources"].items()),
    ]
    return "\n".join(lines) + "\n"


def _mean_error(rows: list[dict[str, Any]], name: str) -> float:
    return float(sum(abs(row[name]) for row in rows) / len(rows))


def _paragraph(text: str) -> str:
    return textwrap.fill(
        text,
        120,
        subsequent_indent="  " if text.startswith("- ") else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    found = record()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")
