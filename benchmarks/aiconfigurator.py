"""Put one static question to `kvsim plan` and to NVIDIA AIConfigurator, and compare their steps kernel by kernel.

12,000 tokens in, 343 out, TTFT 5 s, TPOT 50 ms, 32 GPUs, Llama-3.1-70B. The other tool runs in an environment of its
own (`pip install aiconfigurator==0.12.*`), on the CPU; its rankings are read from the files that it writes, its steps
and the share of each operation from what it prints. Ours answers for a trace of such requests, one after the other at
even gaps, with bounds of the mean as the other's are. `docs/measured/aiconfigurator.md` is written from the result.

    PYTHONPATH=. python benchmarks/aiconfigurator.py --other PYTHON [--out benchmarks/results/aiconfigurator.json]
"""

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import traces
from benchmarks.docs_tables.runs import asked, commit
from kvsim import load_gpu, load_model, plan
from traces import Trace

ROOT = Path(__file__).parents[1]
PROMPT, OUTPUT, TTFT_S, TPOT_S, GPUS = 12_000, 343, 5.0, 0.05, 32
MODEL, OTHER_MODEL = "llama-3.1-70b", "meta-llama/Meta-Llama-3.1-70B"
SYSTEMS = {"h100-sxm": "h100_sxm", "h200-sxm": "h200_sxm"}
BACKENDS = ("vllm", "trtllm", "sglang")
REQUESTS, RATE_RPS = 3600, 5.0  # of our trace: twelve minutes
PREFILLS = ((2, 1), (4, 1), (8, 1))  # tp, batch
DECODES = ((4, 8), (4, 16), (4, 32), (8, 24), (8, 92))
DETAILED = 4, 32  # tp and batch of the steps that are taken apart
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 80, 8192, 64, 8, 128, 28672, 128256
KEPT = ("ttft", "tpot", "tokens/s/gpu", "seq/s", "concurrency", "num_total_gpus", "tp", "bs")
KEPT_APART = tuple(f"({pool}){name}" for pool in "pd" for name in ("workers", "tp", "bs", "seq/s/worker"))


def other(python: str, *words: str) -> tuple[str, float]:
    """What the other tool prints, and the seconds that it took."""
    began_s = time.perf_counter()
    code = "import sys; from aiconfigurator.main import main; sys.exit(main())"
    command = [python, "-W", "ignore", "-c", code, "cli", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr, time.perf_counter() - began_s


def ranked(python: str, system: str, backend: str) -> dict[str, Any]:
    """Its best configurations, together and apart, the best first."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model-path", OTHER_MODEL, "--system", system, "--backend", backend, "--total-gpus", str(GPUS)]
        words += ["--isl", str(PROMPT), "--osl", str(OUTPUT), "--ttft", f"{TTFT_S * 1e3:g}"]
        _, wall_s = other(python, "default", *words, "--tpot", f"{TPOT_S * 1e3:g}", "--save-dir", folder)
        found: dict[str, Any] = {"backend": backend, "wall_s": wall_s}
        for mode in ("agg", "disagg"):
            (path,) = Path(folder).rglob(f"{mode}/best_config_topn.csv")
            with path.open(newline="") as file:
                rows = [{k: _plain(row[k]) for k in (*KEPT, *KEPT_APART) if k in row} for row in csv.DictReader(file)]
            (version,) = {row["version"] for row in _rows(path, "version")} or {""}
            found[mode], found["perf_db"] = rows, version
    return found


def _rows(path: Path, *names: str) -> list[dict[str, str]]:
    """The columns of that name, or of a pool's."""
    with path.open(newline="") as file:
        return [{name: row.get(name) or row[f"(p){name}"] for name in names} for row in csv.DictReader(file)]


def _plain(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def step(python: str, system: str, mode: str, tp: int, batch: int) -> dict[str, Any]:
    """A step of the other tool with vLLM's kernels: milliseconds, and of each operation with where it is from."""
    words = ["--model-path", OTHER_MODEL, "--system", system, "--backend", "vllm", "--isl", str(PROMPT)]
    words += ["--osl", str(OUTPUT), "--tp-size", str(tp), "--batch-size", str(batch), "--estimate-mode", mode]
    text, _ = other(python, "estimate", *words, "--detail", "all")
    label = "ttft" if mode == "static_ctx" else "tpot"
    found = re.search(rf"^\s+{label}\s+([\d.]+) ms", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"the other tool printed no {label} for {mode} at tp {tp}: {text[-400:]}")
    steps = 1 if mode == "static_ctx" else OUTPUT - 1
    line = re.compile(r"^\s+(?:context|generation)_(\w+)\s+([\d.]+) ms\s+[\d.]+ ms.*\[(\w+)\]", re.MULTILINE)
    ops = {name: {"ms": float(ms) / steps, "source": source} for name, ms, source in line.findall(text)}
    return {"ms": float(found[1]), "ops": ops}


def ours_ms(gpu: str, tp: int, batch: int, *, prefill: bool) -> float:
    """The same step by `kvsim explain`: a whole prompt, or a decode step in the middle of the answer."""
    context = PROMPT if prefill else PROMPT + OUTPUT // 2
    words = ["--policy", "full", "--model", MODEL, "--gpu", gpu, "--tp", str(tp), "--context", str(context)]
    (row,) = asked("explain", *words, *([] if prefill else ["--batch", str(batch)]))
    return 1e3 * float(row["prefill_s"] if prefill else row["batch"] / row["output_tokens_per_s"])


def ops_ms(gpu: str, tp: int, tokens: int, batch: int, *, prefill: bool) -> dict[str, float]:
    """Our prices of the operations that the other tool prints, of all layers of one step."""
    kernels = load_gpu(gpu).kernels
    heads, kv_heads, inner = HEADS // tp, max(1, KV_HEADS // tp), INTERMEDIATE // tp
    m = tokens if prefill else batch

    def gemm_s(n: int, k: int, rows: int = m) -> float:
        return kernels.gemm_s(m=rows, n=n, k=k, dtype="bf16", captured=not prefill)

    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM}
    attention_s = (
        kernels.prefill_attention_s(batch=batch, tokens=tokens, **shape)
        if prefill
        else kernels.decode_attention_s(batch=batch, context_tokens=tokens, **shape)
    )
    reduced_s = kernels.all_reduce_s(nbytes=2 * m * HIDDEN, gpus=tp)
    layer = {
        "qkv_gemm": gemm_s((heads + 2 * kv_heads) * HEAD_DIM, HIDDEN),
        "attention": attention_s,
        "proj_gemm": gemm_s(HIDDEN, heads * HEAD_DIM),
        "gate_ffn1_gemm": gemm_s(2 * inner, HIDDEN),
        "ffn2_gemm": gemm_s(HIDDEN, inner),
        "ar_1": reduced_s,
    }
    logits = {"logits_gemm": gemm_s(VOCABULARY // tp, HIDDEN, 1 if prefill else batch)}
    return {name: 1e3 * LAYERS * s for name, s in layer.items()} | {name: 1e3 * s for name, s in logits.items()}


def steps(python: str, gpu: str) -> list[dict[str, Any]]:
    """Both tools' steps beside each other."""
    rows = []
    for prefill, sizes in ((True, PREFILLS), (False, DECODES)):
        for tp, batch in sizes:
            theirs = step(python, SYSTEMS[gpu], "static_ctx" if prefill else "static_gen", tp, batch)
            row = {"step": "prefill" if prefill else "decode", "tp": tp, "batch": batch, "other_ms": theirs["ms"]}
            row["ours_ms"] = ours_ms(gpu, tp, batch, prefill=prefill)
            if (tp, batch) == DETAILED or (prefill and tp == DETAILED[0]):
                tokens = PROMPT if prefill else PROMPT + OUTPUT // 2
                own = ops_ms(gpu, tp, tokens, batch, prefill=prefill)
                row["ops"] = {
                    name: {"other_ms": one["ms"], "source": one["source"], "ours_ms": own[name]}
                    for name, one in theirs["ops"].items()
                    if name in own
                }
            rows.append(row)
    return rows


def ours(gpu: str, trace: Path) -> dict[str, Any]:
    """The answer of `kvsim plan`, and its ranked configurations by the load that they hold."""
    slo = f"ttft_mean={TTFT_S}s,tpot_mean={TPOT_S}s"
    began_s = time.perf_counter()
    found = plan(trace=str(trace), model=MODEL, gpu=gpu, gpus=GPUS, slo=slo).to_dict()
    rows = []
    for row in found["configurations"]:
        if row["sustained"] is None:
            continue
        rate_rps = RATE_RPS * row["sustained"]
        kept = {name: row[name] for name in ("tp", "gpus", "prefill_gpus", "sustained")}
        rows.append({**kept, "rate_rps": rate_rps, "tokens_per_s_per_gpu": rate_rps * OUTPUT / GPUS})
    answer = found["answer"]
    at = {round(one["rate_scale"], 9): one for one in answer["load"]["curve"]}[round(answer["load"]["holds_at"], 9)]
    return {
        "wall_s": time.perf_counter() - began_s,
        "first_s": found["first_answer"]["wall_s"],
        "simulations": found["simulations"],
        "answer": {name: answer[name] for name in ("tp", "gpus", "prefill_gpus", "simulate")},
        "at_load": {"rate_rps": RATE_RPS * at["rate_scale"], **at["slo"]},
        "breaks": answer["load"]["breaks"],
        "ranked": rows,
    }


def together(gpu: str, trace: Path) -> dict[str, Any]:
    """The same without pools: latencies at the load that is held, and at others."""
    found = plan(
        trace=str(trace), model=MODEL, gpu=gpu, gpus=GPUS, slo=f"ttft_mean={TTFT_S}s,tpot_mean={TPOT_S}s", pools=False
    ).to_dict()
    load = found["answer"]["load"]
    at = next(one for one in load["curve"] if abs(one["rate_scale"] - load["holds_at"]) < 1e-9)
    curve = [{"rate_rps": RATE_RPS * one["rate_scale"], **one["slo"]} for one in load["curve"]]
    return {"tp": found["answer"]["tp"], "rate_rps": RATE_RPS * at["rate_scale"], **at["slo"], "curve": curve}


def main() -> None:
    """Ask both, and keep the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", required=True, metavar="PYTHON", help="of the environment with aiconfigurator")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "aiconfigurator.json")
    given = parser.parse_args()
    if load_model(MODEL).n_layers != LAYERS:
        raise SystemExit(f"{MODEL} has {load_model(MODEL).n_layers} layers, not {LAYERS}")
    version = "from importlib.metadata import version; print(version('aiconfigurator'))"
    stated = subprocess.run([given.other, "-c", version], check=True, capture_output=True, text=True).stdout.strip()
    result: dict[str, Any] = {
        "schema_version": 1,
        "commit": commit(),
        "command": "python benchmarks/aiconfigurator.py --other PYTHON",
        "device": "CPU",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load_average": round(os.getloadavg()[0], 1),
        "other_version": stated,
        "question": {
            "prompt_tokens": PROMPT,
            "output_tokens": OUTPUT,
            "ttft_s": TTFT_S,
            "tpot_s": TPOT_S,
            "gpus": GPUS,
        },
        "gpus": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "even.jsonl"
        lengths = {"prompt_tokens": np.full(REQUESTS, PROMPT), "output_tokens": np.full(REQUESTS, OUTPUT)}
        traces.write(Trace.from_columns(name="even", arrival_s=np.arange(REQUESTS) / RATE_RPS, **lengths), trace)
        for gpu, system in SYSTEMS.items():
            found = ours(gpu, trace)
            found["answer"]["simulate"] = found["answer"]["simulate"].replace(str(trace), "even.jsonl")
            result["gpus"][gpu] = {
                "other": [ranked(given.other, system, backend) for backend in BACKENDS],
                "ours": {**found, "together": together(gpu, trace)},
                "steps": steps(given.other, gpu),
            }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
