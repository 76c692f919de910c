"""The page that puts one static question to AIConfigurator and to `kvsim plan`, from what its script has kept."""

from typing import Any

from benchmarks.docs_tables.markdown import holding, paragraph, share, table
from kvsim.text.units import format_s

PREFILL_FACTOR, RATE_FACTOR = 1.1, 0.9  # the other tool's defaults: prefill_latency_correction, and of rates in pools
_NAMES = {"vllm": "vLLM", "trtllm": "TensorRT-LLM", "sglang": "SGLang"}
_OPS = {
    "qkv_gemm": "GEMM to queries, keys, values",
    "attention": "attention",
    "proj_gemm": "GEMM after attention",
    "gate_ffn1_gemm": "GEMM to gate and up",
    "ffn2_gemm": "GEMM down",
    "ar_1": "all-reduce, one of two",
    "logits_gemm": "GEMM to logits",
}


def page(result: dict[str, Any]) -> str:
    """Answers beside each other, then steps, then operations, and what the other tool shows."""
    asked, gpus = result["question"], result["gpus"].items()
    heads = ("GPU", "tool", "replicas", "tokens/s of a GPU", "requests/s", "TTFT", "TPOT")
    answers = table(heads, [row for gpu, found in gpus for row in _answers(gpu, found, asked)], left=3)
    heads = ("GPU", "step", "tp", "batch", "AIConfigurator", "kvsim", "kvsim / AIConfigurator")
    steps = table(heads, [row for gpu, found in gpus for row in _steps(gpu, found)], left=2)
    heads = ("GPU", "step", "operation", "source", "AIConfigurator", "kvsim", "ratio")
    kernels = table(heads, [row for gpu, found in gpus for row in _kernels(gpu, found)], left=4)
    why = "".join(paragraph(*_why(gpu, found, asked), item=True) for gpu, found in gpus)
    return (
        f"# Beside AIConfigurator\n\n{_head(result)}\n{_question(asked)}\n## Answers\n\n{answers}\n{why}\n"
        f"## Steps\n\n{_STEPS}\n{steps}\n{paragraph(*_apart(result))}\n"
        f"## Kernels\n\n{_KERNELS}\n{kernels}\n## What it shows\n\n{_shown(result)}"
    )


_STEPS = paragraph(
    "The same steps by both, with vLLM's kernels in the other tool: a prompt alone, and a decode step of so many",
    "sequences in the middle of their answers.",
)
_KERNELS = paragraph(
    "What these steps are made of, in all 80 layers. The other tool reads its measured tables (`silicon`), partly with",
    "a rule beyond them (`mixed`); kvsim has closed forms that were fitted to vLLM's tables of the H100, and takes the",
    "H200 for the same chip with another memory (`kernel_prices.md`).",
)


def _head(result: dict[str, Any]) -> str:
    return paragraph(
        "Written by `python -m benchmarks.docs_tables --pages aiconfigurator` from",
        "`benchmarks/results/aiconfigurator.json`, which `benchmarks/aiconfigurator.py` measures:",
        f"{result['device']}, {result['machine']}, commit {result['commit']}, AIConfigurator {result['other_version']}",
        "(now AISimulate).",
    )


def _question(asked: dict[str, Any]) -> str:
    return paragraph(
        f"The question: Llama-3.1-70B in bf16, {asked['prompt_tokens']:,} tokens in, {asked['output_tokens']} out,",
        f"TTFT within {format_s(asked['ttft_s'])}, TPOT within {format_s(asked['tpot_s'])}, {asked['gpus']} GPUs.",
        "AIConfigurator adds up kernels and takes means; `kvsim plan --gpus` plays requests that come at even gaps, in",
        "steps of a twentieth of the load, and bounds the means too. Requests that come by chance need more room than",
        "either says.",
    )


def _answers(gpu: str, found: dict[str, Any], asked: dict[str, Any]) -> list[list[str]]:
    rows = []
    for other in found["other"]:
        name = f"AIConfigurator, {_NAMES[other['backend']]} {other['perf_db']}"
        for best in (other["agg"][:1], other["disagg"][:1]):
            rows += [[gpu, name, _split_of(one, asked), *_figures(one, asked)] for one in best]
    ours, together = found["ours"], found["ours"]["together"]
    answer, replicas = ours["answer"], asked["gpus"] // together["tp"]
    rows.append([gpu, "kvsim plan", f"{replicas} x tp {together['tp']}", *_ours(together, asked)])
    if answer["prefill_gpus"]:
        prompts = answer["prefill_gpus"] // answer["tp"]
        decoding = answer["gpus"] // answer["tp"] - prompts
        split = f"{prompts} x tp {answer['tp']} for prompts, {decoding} x tp {answer['tp']}"
        rows.append([gpu, "kvsim plan", split, *_ours(ours["at_load"], asked)])
    return rows


def _split_of(one: dict[str, Any], asked: dict[str, Any]) -> str:
    times = asked["gpus"] // int(one["num_total_gpus"])
    if "(p)tp" not in one:
        return f"{times} x tp {one['tp']:g}"
    pools = [f"{times * int(one[f'({pool})workers'])} x tp {one[f'({pool})tp']:g}" for pool in "pd"]
    return f"{pools[0]} for prompts, {pools[1]}"


def _figures(one: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    rate_rps = one["tokens/s/gpu"] * asked["gpus"] / asked["output_tokens"]
    times = [format_s(one[name] / 1e3) for name in ("ttft", "tpot")]
    return [f"{one['tokens/s/gpu']:.1f}", f"{rate_rps:.2f}", *times]


def _ours(at: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    tokens = at["rate_rps"] * asked["output_tokens"] / asked["gpus"]
    return [f"{tokens:.1f}", f"{at['rate_rps']:.2f}", format_s(at["ttft_mean"]), format_s(at["tpot_mean"])]


def _why(gpu: str, found: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Where the answers differ on a GPU, by the steps that both priced."""
    vllm = next(one for one in found["other"] if one["backend"] == "vllm")
    apart, alone = vllm["disagg"][0], {row["tp"]: row for row in found["steps"] if row["step"] == "prefill"}
    prompt = alone[int(apart["(p)tp"])]
    slower = 1e3 / apart["(p)seq/s/worker"] / prompt["other_ms"]
    workers = asked["gpus"] // int(apart["num_total_gpus"]) * int(apart["(p)workers"])
    rate_rps = apart["tokens/s/gpu"] * asked["gpus"] / asked["output_tokens"]
    kept = rate_rps / (workers * apart["(p)seq/s/worker"])
    waits = apart["ttft"] * apart["(p)seq/s/worker"] / 1e3
    ours = found["ours"]
    more = ours["at_load"]["rate_rps"] / rate_rps - 1
    constants = (
        f"These are constants of its source ({PREFILL_FACTOR:g}, {RATE_FACTOR:g}, 1.8), for bubbles and queues;",
        f"without them its replicas for prompts would take {rate_rps * slower / kept:.2f} requests/s. kvsim plays",
        "queues instead, and even gaps leave none.",
    )
    pools = (
        f"The other tool has tp {apart['(p)tp']:g} for prompts and {apart['(d)tp']:g} for decoding; kvsim one for both."
    )
    return [
        f"{gpu}, with vLLM's kernels and prompts apart: kvsim serves {share(more)} more. A prompt alone takes the",
        f"other tool {format_s(prompt['other_ms'] / 1e3)} and kvsim {format_s(prompt['ours_ms'] / 1e3)} at tp",
        f"{prompt['tp']}; its answer then has {slower:.2f} times as long for a prompt, {kept:.2f} of the rate of the",
        f"replicas for prompts, and {waits:.2f} times a prompt's time as TTFT.",
        *holding(
            (abs(slower - PREFILL_FACTOR) < 0.01 and abs(kept - RATE_FACTOR) < 0.01, " ".join(constants)),
            (int(apart["(p)tp"]) != int(apart["(d)tp"]), pools),
        ),
        *_together(found, vllm, asked),
    ]


def _together(found: dict[str, Any], vllm: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Without pools: the TPOT of both at the load that the other tool answers."""
    best, ours = vllm["agg"][0], found["ours"]["together"]
    own = next((one for one in vllm["agg"] if int(one["tp"]) == ours["tp"]), None)
    if own is None:
        return []
    rate_rps = own["tokens/s/gpu"] * asked["gpus"] / asked["output_tokens"]
    below = [one for one in ours["curve"] if one["rate_rps"] <= rate_rps]
    above = [one for one in ours["curve"] if one["rate_rps"] > rate_rps]
    if not below or not above:
        return []
    low, high = below[-1], above[0]
    part = (rate_rps - low["rate_rps"]) / (high["rate_rps"] - low["rate_rps"])
    tpot_s = low["tpot_mean"] + part * (high["tpot_mean"] - low["tpot_mean"])
    ahead = best["tokens/s/gpu"] / own["tokens/s/gpu"] - 1
    prompt = next(one for one in found["steps"] if one["step"] == "prefill" and one["tp"] == ours["tp"])
    each_rps = rate_rps * ours["tp"] / asked["gpus"]
    busy = [each_rps * ms / 1e3 for ms in (PREFILL_FACTOR * prompt["other_ms"], prompt["ours_ms"])]
    return [
        f"Together, at tp {ours['tp']} and {rate_rps:.2f} requests/s, the other tool has a TPOT of",
        f"{format_s(own['tpot'] / 1e3)}, kvsim {format_s(tpot_s)}: tokens wait for the prompts of their replica, which",
        f"take {share(busy[0])} of its time there (with the factor of {PREFILL_FACTOR:g}) and {share(busy[1])} here.",
        *holding((best is not own, f"The other tool prefers tp {best['tp']:g}, by {share(ahead)}.")),
    ]


def _steps(gpu: str, found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            gpu,
            row["step"],
            f"{row['tp']}",
            f"{row['batch']}",
            format_s(row["other_ms"] / 1e3),
            format_s(row["ours_ms"] / 1e3),
            f"{row['ours_ms'] / row['other_ms']:.3f}",
        ]
        for row in found["steps"]
    ]


def _apart(result: dict[str, Any]) -> list[str]:
    """How far the steps are apart at the most."""
    ratios: dict[str, list[float]] = {}
    for found in result["gpus"].values():
        for row in found["steps"]:
            ratios.setdefault(row["step"], []).append(abs(row["ours_ms"] / row["other_ms"] - 1))
    return [f"{step.capitalize()} steps are at most {share(max(own))} apart." for step, own in ratios.items()]


def _kernels(gpu: str, found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            gpu,
            f"{row['step']}, tp {row['tp']}, batch {row['batch']}",
            _OPS[name],
            one["source"],
            format_s(one["other_ms"] / 1e3),
            format_s(one["ours_ms"] / 1e3),
            f"{one['ours_ms'] / one['other_ms']:.2f}",
        ]
        for row in found["steps"]
        for name, one in row.get("ops", {}).items()
    ]


def _shown(result: dict[str, Any]) -> str:
    """What the other tool prints or writes, and what kvsim has of it."""
    gpus = result["gpus"].values()
    theirs = [one["wall_s"] for found in gpus for one in found["other"]]
    ours = max(found["ours"]["wall_s"] for found in gpus)
    items = (
        (
            f"An answer for a GPU and an engine in {min(theirs):.0f} to {max(theirs):.0f} s on that machine, its load",
            f"average {result['load_average']:g}; kvsim's for a GPU in at most {ours:.0f} s.",
        ),
        (
            "A Pareto front drawn in the terminal, of tokens/s of a GPU against tokens/s of a user: `kvsim plan` draws",
            "cost against distance from the SLO, by which a plan is chosen; its page has latency and goodput by load.",
        ),
        (
            "Configurations ranked, prompts and decoding together and apart: `kvsim plan` ranks every split that it",
            "simulated.",
        ),
        (
            "Files to deploy with (Dynamo, llm-d, Kubernetes manifests): not here. `kvsim plan` prints the launch",
            "flags of vLLM and SGLang for each pool; a manifest names images, volumes and namespaces, of which a",
            "simulator knows nothing.",
        ),
        (
            "What it was not asked here, and kvsim answers: a trace with its bursts, percentiles, prefix caches that",
            "fill, sparse policies and what they lose, prices, seeds and intervals.",
        ),
        ("What kvsim does not answer: pools of different tp, TensorRT-LLM's kernels.",),
    )
    return "".join(paragraph(*item, item=True) for item in items)
