"""How fast the runtime is on a real GPU, beside what the simulator says: `kvsim bench` at the shapes of a table.

    python benchmarks/performance.py [SECTION ...] [--commit COMMIT]     measure sections (default: all), some minutes
    python benchmarks/performance.py --page                              write docs/performance.md from the results

Each section is one call of `kvsim bench` and is written as it ends, so that a run that is cut short loses nothing.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from kvsim.cli.bench import decode, kernels  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "performance.json"
PAGE = ROOT / "docs" / "performance.md"
CAPTURED = ("full", "shadowkv", "quest", "snapkv", "sink-window", "squeezed-attention")
EAGER = ("retroinfer", "offload-all")
DECODE = {"model": "llama-3.1-8b", "host": "h200-vm", "steps": 24, "generate_steps": 12}
HEADINGS = (
    *("cache", "prompt", "batch", "TTFT", "predicted", "TPOT", "predicted", "floor", "in `generate`", "HBM peak"),
    *("from DDR a token", "data decided"),
)
SECTIONS: dict[str, dict[str, Any]] = {  # options of `kvsim bench decode`; of `kvsim bench kernels` there are none
    "8k": {**DECODE, "context": "8k", "policy": [*CAPTURED, *EAGER]},
    "32k": {**DECODE, "context": "32k", "policy": [*CAPTURED, *EAGER]},
    "128k": {**DECODE, "context": "128k", "policy": ["full", "shadowkv", "snapkv", "sink-window"]},
    "128k, near tokens": {**DECODE, "context": "128k", "token_every": 12, "policy": ["shadowkv"]},
    "8k, batch 8": {**DECODE, "context": "8k", "batch": "8", "policy": ["full", "shadowkv", "quest"]},
    "kernel by kernel": {**DECODE, "context": "32k", "capture": False, "steps": 8, "policy": ["full", "shadowkv"]},
    "Transformers": {
        **DECODE,
        "context": "8k,32k,128k",
        "steps": 8,
        "generate_steps": 0,
        "policy": ["full"],
        "baseline": ["hf-dynamic", "hf-static", "hf-offloaded"],
    },
    "kernels": {},
}


def _command(options: dict[str, Any]) -> str:
    """What a user types for them."""
    words = ["kvsim bench", "decode" if options else "kernels"]
    for name, value in options.items():
        flag = name.replace("_", "-")
        given = value if isinstance(value, list) else [value]
        words += [f"--no-{flag}" if each is False else f"--{flag} {each}" for each in given]
    return " ".join(words)


def measure(names: list[str], commit: str) -> None:
    """Run sections one after the other."""
    for name in names:
        began = time.perf_counter()
        aside = OUT.with_suffix(".part")
        options = SECTIONS[name]
        (decode if options else kernels)(**options, out=aside)
        found = json.loads(aside.read_text("utf-8"))
        aside.unlink()
        about = {"command": _command(options), "commit": commit, "date": time.strftime("%F")}
        kept = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {"schema_version": 1, "sections": {}}
        kept["sections"][name] = {**about, "seconds": time.perf_counter() - began, **found}
        OUT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        sys.stdout.flush()


def page(results: dict[str, Any]) -> str:
    """The results as a page."""
    sections = results["sections"]
    decoding = {name: section for name, section in sections.items() if section["kind"] == "bench-decode"}
    first = next(iter(sections.values()))
    commits = sorted({section["commit"] for section in sections.values()})
    about = INTRODUCTION.format(
        device=first["device"],
        driver=first.get("driver", "unknown"),
        torch=first["torch"],
        transformers=first["transformers"],
        commits=", ".join(commits),
        dates=", ".join(sorted({section["date"] for section in sections.values()})),
    )
    parts = [about, _errors(decoding)]
    for name, section in decoding.items():
        parts.append(f"## {TITLES[name]}\n\n```\n{section['command']}\n```\n\n{_decode_table(section['rows'])}")
    if "kernels" in sections:
        parts.append(f"## Kernels by themselves\n\n{KERNELS}\n{_kernel_table(sections['kernels']['rows'])}")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _decode_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {' | '.join(HEADINGS)} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        if "failed" in row:
            cells = [row["cache"], f"{row['prompt_tokens']:,}", row["batch"], "does not fit", *[""] * 8]
        else:
            moved = row["moved_bytes_per_token"].get("ddr->hbm", 0) / 2**20
            cells = [
                row["cache"] + ("" if row["replayed_steps"] or row["cache"].startswith("hf-") else " (eager)"),
                f"{row['prompt_tokens']:,}",
                row["batch"],
                "filled" if row["ttft_s"] is None else f"{row['ttft_s']:.2f} s",
                _predicted(row, "ttft", 1, "s"),
                f"{row['tpot_s'] * 1e3:.2f} ms",
                _predicted(row, "tpot", 1e3, "ms"),
                f"{row['floor_tpot_s'] * 1e3:.2f} ms" if "floor_tpot_s" in row else "",
                f"{row['generate_tpot_s'] * 1e3:.2f} ms" if row["generate_tpot_s"] else "",
                f"{row['peak_hbm_bytes'] / 2**30:.1f} GiB" if row["peak_hbm_bytes"] else "",
                f"{moved:.2f} MiB" if moved else "",
                ", ".join(f"{name} {share:.0%}" for name, share in row["counts"].items()),
            ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _predicted(row: dict[str, Any], name: str, scale: float, unit: str) -> str:
    if f"predicted_{name}_s" not in row:
        return ""
    error = f" ({row[f'{name}_error']:+.0%})" if f"{name}_error" in row else ""
    return f"{row[f'predicted_{name}_s'] * scale:.2f} {unit}{error}"


def _errors(sections: dict[str, dict[str, Any]]) -> str:
    """Mean and largest error of predicted steps, of those that were captured and of the others."""
    lines = ["| decode steps | rows | mean error | largest |", "|---|---:|---:|---:|"]
    rows = [row for section in sections.values() for row in section["rows"] if "tpot_error" in row]
    for title, some in (
        ("replayed as one graph", [row for row in rows if row["replayed_steps"]]),
        ("kernel by kernel", [row for row in rows if not row["replayed_steps"]]),
    ):
        if some:
            errors = [row["tpot_error"] for row in some]
            worst = max(errors, key=abs)
            mean = sum(map(abs, errors)) / len(errors)
            lines.append(f"| {title} | {len(some)} | {mean:.0%} | {worst:+.0%} |")
    full = next(row for row in rows if row["cache"] == "full" and row["replayed_steps"])
    gap = ERRORS.format(
        tokens=full["prompt_tokens"],
        more_ms=(full["tpot_s"] - full["predicted_tpot_s"]) * 1e3,
        tpot_ms=full["tpot_s"] * 1e3,
    )
    return "## Predicted and measured\n\n" + gap + "\n" + "\n".join(lines)


def _kernel_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| kernel | shape | time | bytes over it | PyTorch's |", "|---|---|---:|---:|---:|"]
    for row in rows:
        rate = row["nbytes"] / row["seconds"]
        shown = f"{rate / 1e12:.2f} TB/s" if row["link"] == "hbm" else f"{rate / 1e9:.1f} GB/s of PCIe"
        other = "" if row["torch_s"] is None else f"{row['torch_s'] * 1e6:.1f} us"
        lines.append(f"| {row['kernel']} | {row['shape']} | {row['seconds'] * 1e6:.1f} us | {shown} | {other} |")
    return "\n".join(lines)


TITLES = {
    "8k": "8K tokens, one sequence",
    "8k, batch 8": "8K tokens, eight sequences",
    "32k": "32K tokens, one sequence",
    "128k": "128K tokens, one sequence",
    "128k, near tokens": "128K tokens, where queries are alike",
    "kernel by kernel": "Without capture",
    "Transformers": "Beside the caches of Transformers",
}
INTRODUCTION = """\
# Performance

Written by `python benchmarks/performance.py --page` from `benchmarks/results/performance.json`: {device}, driver
{driver}, PyTorch {torch}, Transformers {transformers}; {dates}, commit {commits}.

Llama-3.1-8B's shape with random weights in bf16, unmodified modules of Transformers, not compiled; `kvsim bench decode`
measures the same on another machine.

- *TTFT* is the prompt in one forward, with whatever the policy builds of it. The first prompt of a process also pays
  for pinned host memory and for compiling kernels. *TPOT* is the mean time between the ends of steps in a loop that
  never waits for the GPU, *in `generate`* the median there, sampling and stopping criteria included.
- Rows are replayed as one CUDA graph, but for those marked *eager*.
- *predicted* is kvsim's for `h200-sxm@measured`, at the shares that data decided in that run. *floor* is the same at
  the datasheet's rates, with nothing lost to launches: no step can be faster. Both price a serving engine's fused
  kernels, which Transformers' modules are not.
- Random weights draw near-uniform attention, so that policies which keep what they chose find little of it again:
  ShadowKV misses most chunks here, where it missed about 40 % in its paper.
"""
ERRORS = """\
Of the prediction against TPOT in a loop, over all rows below. Where attention is short, what is missing is the same in
every row: `full` at {tokens:,} tokens takes {tpot_ms:.2f} ms, {more_ms:.2f} ms more than predicted, for norms,
rotations and activations that are kernels of their own in Transformers' modules and fused in the engines whose kernels
are priced. Policies that select take longer by the small kernels of their selection, whose work alone a plan prices.
"""
KERNELS = """\
One launch in a graph of several over different inputs (`kvsim bench kernels`). *bytes over it* are those that the
kernel must move, over its time; an H200's HBM gives 4.8 TB/s by its datasheet and some 4.3 in a copy.
"""


def _git() -> str:
    run = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(run, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip() or "unknown"


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--commit", default=None, help="where there is no git")
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if unknown := sorted(set(given.sections) - SECTIONS.keys()):
        parser.error(f"no section is called {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if given.page:
        PAGE.write_text(page(json.loads(OUT.read_text("utf-8"))), encoding="utf-8")
    else:
        measure(given.sections or list(SECTIONS), given.commit or _git())


if __name__ == "__main__":
    main()
