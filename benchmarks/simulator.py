"""Speed of the simulator: CPU seconds of its event loop on the workloads that peers were timed on, and on its own.

Llama-3-8B on A100-80G, chunks of 512 tokens, up to 512 sequences; W1 on one replica, W2 on eight, with prefix caches
off and on (then half of each prompt is the head of one of 200 documents, in blocks of 512 tokens). Mooncake's hour of
chat, with Llama-3.1-8B on H100s, for each router and number of replicas. Once, an agentic trace in closed loop and a
million synthetic requests on sixteen replicas. NVIDIA Dynamo's replay is timed beside them where `ai-dynamo-runtime` is
installed, in this environment or in that of `--peer-python`.

Each run is a process of its own; the median of `--runs` is reported, with a pure-Python loop timed beside it so that
machines can be compared. All are compiled, and the compiler takes none of these seconds, for it is a process beside
them; loading what it has kept does (`docs/measured/start.md`).

    python benchmarks/simulator.py [--runs 5] [--large] [--peer-python PATH] [--out benchmarks/results/simulator.json]
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

HERE = Path(__file__).parent
WORKLOADS = {"W1": ("W1_conv2k_qps6.45.csv", 1), "W2": ("W2_conv10k_qps51.6.csv", 8)}
POLICIES = ("full", "shadowkv")
A100 = ("--model", "llama-3-8b", "--gpu", "a100-80g-sxm", "--max-num-batched-tokens", "512", "--max-num-seqs", "512")
H100 = ("--model", "llama-3.1-8b", "--gpu", "h100-sxm")
DDR = ("--prefix-cache-ddr", "400 GiB")
ROUTERS = ("round-robin", "least-loaded", "prefix-affinity", "kv-aware")
REPLICAS = (1, 4, 16, 64)
DOCUMENTS, ID_TOKENS = 200, 512  # of the prompts that share heads
CHAT = ("name=chat,rate=2,turns=4,prefix=2000", 5000)
MILLION = ("name=chat,rate=64", 1_000_000)  # a tenant at four requests a second for each of 16 replicas
KV_TOKEN_BYTES, DYNAMO_BLOCK_TOKENS = 131072, 16  # of Llama-3-8B in 16 bits
LOOP = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One simulation."""

    workload: str
    trace: str
    gpus: int
    options: tuple[str, ...]
    policy: str = "full"
    tiers: tuple[str, ...] = ()
    router: str = "round-robin"

    @property
    def command(self) -> list[str]:
        """Its command line."""
        options = ["--trace", self.trace, "--gpus", str(self.gpus), "--policy", self.policy, "--router", self.router]
        return [sys.executable, "-m", "kvsim", "simulate", *options, *self.options, *self.tiers, "--json"]


def peers() -> Iterator[Case]:
    """The workloads that peers were timed on."""
    for workload, (file, gpus) in WORKLOADS.items():
        for policy in POLICIES:
            yield Case(workload=workload, trace=str(HERE / "workloads" / file), gpus=gpus, options=A100, policy=policy)


def with_caches(folder: Path) -> Iterator[Case]:
    """The same lengths and arrivals with heads in common, and a tier in DDR."""
    for workload, (file, gpus) in WORKLOADS.items():
        trace = folder / f"{workload}.jsonl"
        share_heads(HERE / "workloads" / file, trace)
        for policy in POLICIES:
            for tiers in ((), DDR):
                yield Case(
                    workload=f"{workload}, shared heads",
                    trace=f"{trace}:time_unit=ms",
                    gpus=gpus,
                    options=A100,
                    policy=policy,
                    tiers=tiers,
                )


def routed(folder: Path) -> Iterator[Case]:
    """An hour of chat by router, and conversations that one replica could serve on up to 64."""
    for router in ("", *ROUTERS):
        tiers = ("--prefix-cache-hbm", "160 GiB", *DDR) if router else ()
        yield Case(
            workload="mooncake-conversation",
            trace="mooncake-conversation",
            gpus=8,
            options=H100,
            tiers=tiers,
            router=router or ROUTERS[0],
        )
    chat = synthetic(folder / "chat.parquet", CHAT)
    for gpus in REPLICAS:
        for router in ROUTERS:
            tiers = ("--prefix-cache-hbm", f"{20 * min(gpus, 8)} GiB", *DDR)
            yield Case(workload="chat", trace=chat, gpus=gpus, options=H100, tiers=tiers, router=router)


def large(folder: Path) -> Iterator[Case]:
    """An agentic trace in closed loop, and a million requests."""
    yield Case(
        workload="agentic-coding, closed loop",
        trace="agentic-coding",
        gpus=8,
        options=("--model", "llama-3.1-8b", "--gpu", "h200-sxm", "--sessions", "closed", "--limit", "10000"),
        tiers=("--prefix-cache-hbm", "160 GiB", *DDR),
        router="prefix-affinity",
    )
    million = synthetic(folder / "million.parquet", MILLION)
    yield Case(workload="million", trace=million, gpus=16, options=A100)


def synthetic(trace: Path, tenant: tuple[str, int]) -> str:
    """Generate a trace of one tenant and so many requests."""
    command = [sys.executable, "-m", "kvsim", "trace", "synth", "--tenant", tenant[0], "--requests", str(tenant[1])]
    subprocess.run([*command, "--out", str(trace)], check=True, cwd=HERE.parent, capture_output=True)
    return str(trace)


def share_heads(lengths: Path, out: Path) -> None:
    """Write a CSV of lengths as Mooncake's JSONL: half of each prompt, in whole blocks, is the head of a document."""
    rng = np.random.default_rng(0)
    fresh = 1_000_000  # no document has an id as large
    with lengths.open() as rows, out.open("w") as lines:
        for row in csv.DictReader(rows):
            prompt_tokens = int(row["num_prefill_tokens"])
            blocks = -(-prompt_tokens // ID_TOKENS)
            document, head = int(rng.zipf(1.3)) % DOCUMENTS, blocks // 2
            tail = blocks - head
            request = {
                "timestamp": 1000 * float(row["arrived_at"]),
                "input_length": prompt_tokens,
                "output_length": int(row["num_decode_tokens"]),
                "hash_ids": [*range(1000 * document, 1000 * document + head), *range(fresh, fresh + tail)],
            }
            lines.write(json.dumps(request) + "\n")
            fresh += tail


def run(command: Sequence[str]) -> tuple[dict[str, float], dict[str, object]]:
    """What a process printed as JSON, and its peak of memory."""
    env = os.environ | {"KVSIM_COMPILE": "first"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent, env=env) as process:
        out = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {"peak_rss_bytes": usage.ru_maxrss * 1024}, json.loads(out)


def one_run(case: Case) -> dict[str, float]:
    """The figures of one simulation in a fresh process."""
    figures, summary = run(case.command)
    for name in ("cpu_s", "setup_cpu_s", "wall_s"):
        figures[name] = summary[name]
    figures["requests"], figures["output_tokens"] = summary["requests"]["finished"], summary["tokens"]["output"]
    figures["kv_bytes"] = summary["inputs"]["capacity_bytes"]["hbm"]
    return figures


def measured(case: Case, runs: int) -> dict[str, object]:
    """Medians over `runs` runs, and a line of them."""
    row = medians([one_run(case) for _ in range(runs)])
    named = {"workload": case.workload, "replicas": case.gpus, "policy": case.policy, "router": case.router}
    row = named | {"prefix_cache": " ".join(case.tiers) or None} | row
    where = f"{case.gpus:3d} {case.policy:9s} {case.router:15s} {'cached' if case.tiers else '':6s}"
    sys.stdout.write(line(f"{case.workload:28s} {where}", row))
    sys.stdout.flush()
    return row


def medians(figures: list[dict[str, float]]) -> dict[str, object]:
    """Medians of repeated runs."""
    cpu_s = statistics.median(run["cpu_s"] for run in figures)
    row: dict[str, object] = {
        "cpu_s": cpu_s,
        "cpu_s_min": min(run["cpu_s"] for run in figures),
        "cpu_s_max": max(run["cpu_s"] for run in figures),
        "wall_s": statistics.median(run["wall_s"] for run in figures),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in figures),
        "requests": figures[0]["requests"],
        "requests_per_cpu_s": figures[0]["requests"] / cpu_s,
        "output_tokens_per_cpu_s": figures[0]["output_tokens"] / cpu_s,
        "runs": len(figures),
        "loop_cpu_s": loop_cpu_s(),
    }
    if "setup_cpu_s" in figures[0]:
        row["setup_cpu_s"] = statistics.median(run["setup_cpu_s"] for run in figures)
        row["kv_bytes"] = figures[0]["kv_bytes"]
    return row


def line(label: str, row: dict[str, object]) -> str:
    """A row as text."""
    return (
        f"{label} {row['cpu_s']:7.3f} CPU s ({row['cpu_s_min']:.3f}-{row['cpu_s_max']:.3f})  "
        f"{row['requests_per_cpu_s']:8,.0f} requests/s  {row['output_tokens_per_cpu_s']:10,.0f} tokens/s  "
        f"{row['peak_rss_bytes'] / 2**20:,.0f} MiB  (10 M additions: {row['loop_cpu_s']:.2f} s)\n"
    )


def dynamo(python: str, rows: list[dict[str, object]], runs: int) -> Iterator[dict[str, object]]:
    """Dynamo's replay of W1 and W2, with as much memory for KV, and how many times its CPU seconds are kvsim's."""
    if subprocess.run([python, "-c", "import dynamo._core"], capture_output=True, check=False).returncode:
        sys.stdout.write(
            "ai-dynamo-runtime is not installed, so there is no ratio: pip install ai-dynamo-runtime, or name an "
            "interpreter that has it with --peer-python\n"
        )
        return
    for workload, (file, gpus) in WORKLOADS.items():
        own = next(row for row in rows if row["workload"] == workload and row["policy"] == "full")
        kv_blocks = int(own["kv_bytes"]) // (KV_TOKEN_BYTES * DYNAMO_BLOCK_TOKENS)
        script, trace = str(HERE / "dynamo_replay.py"), str(HERE / "workloads" / file)
        command = [python, script, trace, str(gpus), str(kv_blocks)]
        figures = []
        for _ in range(runs):
            peak, printed = run(command)
            figures.append(printed | peak)
        row = {"workload": workload, "replicas": gpus, "simulator": "dynamo.replay"} | medians(figures)
        row["times_kvsim"] = row["cpu_s"] / own["cpu_s"]
        sys.stdout.write(line(f"{workload:28s} {gpus:3d} dynamo.replay {'':19s}", row))
        sys.stdout.write(f"{workload}: kvsim takes 1/{row['times_kvsim']:.1f} of its CPU seconds\n")
        yield row


def loop_cpu_s() -> float:
    """CPU seconds of ten million additions in this interpreter, now."""
    began = time.process_time()
    total = 0
    for i in range(LOOP):
        total += i
    return time.process_time() - began


def commit() -> str:
    """The commit that is measured, marked when the tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return described.stdout.strip() or "unknown"


def main() -> None:
    """Time every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="also an agentic trace and a million requests, once each")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has ai-dynamo-runtime")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "simulator.json")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        cases = [*peers(), *with_caches(folder), *routed(folder)]
        one_run(cases[0])
        rows = [measured(case, arguments.runs) for case in cases]
        if arguments.large:
            rows += [measured(case, 1) for case in large(folder)]
    rows += dynamo(arguments.peer_python, rows, arguments.runs)
    report = {
        "schema_version": 2,
        "command": "python benchmarks/simulator.py " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[-1],  # of a quarter of an hour: above the cores, others have slowed this down
        "python": platform.python_version(),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
