"""Fit serving constants to records of servers whose constants are known, and keep how near they come.

Records are simulated under known constants, and each latency scatters by a lognormal factor; the fit sees the records
alone. `docs/measured/server_fit.md` is written from the result.

    python benchmarks/server_fit.py [--pages]
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvsim import load_scenario, simulate
from kvsim.observed.calibration import calibrated
from kvsim.text.units import format_s
from traces import Trace

ROOT = Path(__file__).parents[1]
RESULT, WRITTEN = ROOT / "benchmarks" / "results" / "server_fit.json", ROOT / "docs" / "measured" / "server_fit.md"
FLEET = {"model": "llama-3.1-8b", "gpu": "h100-sxm"}
TRUE = {"kernel_slowdown": 1.3, "iteration_overhead": 0.002, "request_overhead": 0.035}
LOADS = {
    "chat, lightly loaded": {"trace": "azure-2023-conv", "limit": 150, "rate_scale": 1.0},
    "chat, four times that": {"trace": "azure-2023-conv", "limit": 300, "rate_scale": 4.0},
    "long prompts, queues": {"trace": "mooncake-conversation:spread_s=3", "limit": 150, "rate_scale": 0.3},
    "200 requests within a second": {
        "trace": "synthetic:rate=200,prompt=lognormal:600:3000,output=lognormal:100:300,span_s=1",
        "limit": 200,
    },
}
SCATTER = (0.0, 0.05, 0.15)
PAGE = """# Constants of a server, fitted

Written by `benchmarks/server_fit.py` from `benchmarks/results/server_fit.json` (commit {commit}).

Records of requests whose server is known: they are simulated with kernels {kernel_slowdown:g} times as slow as they
are priced, {iteration} of the host in each iteration and {request} before a request reaches the scheduler (Llama-3.1-8B
on one H100). Each TTFT and each mean time between tokens scatters by a lognormal factor. `--calibrate-from` sees the
records alone; the error left is of the median request that it did not see. A standard error is written behind ±.

| load | scatter | kernel slowdown | iteration overhead | request overhead | TTFT left | TPOT left | simulations |
|---|---:|---:|---:|---:|---:|---:|---:|
{rows}

Where requests hardly wait, single TTFTs differ by about an iteration by chance, and that is what is left of them. Where
all wait for each other, what comes before the scheduler is lost in the queue: do not trust it there beyond some percent
of TTFT. Standard errors are those of a smooth fit; this one is not quite smooth, and they come out too small.
"""


def records(asked: Trace, found: dict[str, np.ndarray], scatter: float, path: Path) -> str:
    """Records as `kvsim observe` writes them."""
    rng = np.random.default_rng(0)
    first_s = (found["first_token_s"] - found["arrival_s"]) * rng.lognormal(0, scatter, len(asked))
    later_s = (found["finish_s"] - found["first_token_s"]) * rng.lognormal(0, scatter, len(asked))
    lines = [json.dumps({"kvsim_observe": 1})]
    for i, sent_s in enumerate(asked.arrival_s.tolist()):
        row = {"request": i, "status": "finished", "sent_s": sent_s, "first_token_s": sent_s + first_s[i]}
        row |= {"last_token_s": sent_s + first_s[i] + later_s[i], "prompt_tokens": int(asked.prompt_tokens[i])}
        lines.append(json.dumps({**row, "output_tokens": int(asked.output_tokens[i])}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def measured() -> list[dict[str, Any]]:
    """A row for each load and scatter."""
    rows = []
    for load, options in LOADS.items():
        (fleet,) = load_scenario({**FLEET, **options}).setups()
        server = load_scenario({**FLEET, **options, **TRUE})
        asked = server.load_trace()
        found = simulate(asked, server.setups()[0]).requests
        for scatter in SCATTER:
            with tempfile.TemporaryDirectory() as folder:
                began_s = time.process_time()
                fit = calibrated(records(asked, found, scatter, Path(folder) / "seen.jsonl"), fleet, {})
            kept = ("constants", "standard_errors", "error_left", "simulations", "requests", "fitted", "held_out")
            cpu_s = time.process_time() - began_s
            rows.append({"load": load, "scatter": scatter, **{name: fit[name] for name in kept}, "cpu_s": cpu_s})
    return rows


def page(result: dict[str, Any]) -> str:
    """The page of a result."""
    true = result["true"]
    return PAGE.format(
        commit=result["commit"],
        kernel_slowdown=true["kernel_slowdown"],
        iteration=format_s(true["iteration_overhead"]),
        request=format_s(true["request_overhead"]),
        rows="\n".join(map(_row, result["fits"])),
    )


def _row(fit: dict[str, Any]) -> str:
    found, errors, left = fit["constants"], fit["standard_errors"], fit["error_left"]
    cells = [fit["load"], f"{fit['scatter']:.0%}", f"{found['kernel_slowdown']:.3f} ± {errors['kernel_slowdown']:.3f}"]
    cells += [
        f"{1000 * found[name]:.2f} ± {1000 * errors[name]:.2f} ms"
        for name in ("iteration_overhead", "request_overhead")
    ]
    cells += [f"{left[name]['median']:.1%}" for name in ("ttft_s", "tpot_s")]
    return f"| {' | '.join([*cells, str(fit['simulations'])])} |"


def main() -> None:
    """Fit, or read what was kept, and write the page."""
    os.environ.setdefault("KVSIM_COMPILE", "first")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", action="store_true", help="write the page only")
    if not parser.parse_args().pages:
        words = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
        result = {"schema_version": 1, "commit": commit, "true": TRUE, "fits": measured()}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    WRITTEN.write_text(page(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
