"""How many keys' links a search of the query-aware graph reads, beside the keys that it scans.

    python benchmarks/retrieval_followed.py [--layers 1 4 7] [--out FILE]

Of needle-28m's own attention at 2K and 8K, with the graph's default degree: five keys scanned for each that is found
(the policy's default), or a larger share. The default mean of RetrievalAttention's count `followed` rests on it.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from attention_data import examples, needle

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from runtime.index import Graph, GraphParameters  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "retrieval_followed.json"
TOP_K = 100
FACTOR = 5  # keys scanned for each that is found, at the least: the policy's default
SHARES = {2048: (0.02,), 8192: (0.02, 0.1, 0.2)}  # 2 % are fewer than that


def rows_of(context: int, layers: list[int]) -> list[dict[str, float]]:
    """A row for each layer and share: means over the heads and the queries asked."""
    rows = []
    for layer, (keys, queries, asked) in zip(layers, needle(examples(context)[0], layers), strict=True):
        index = Graph.build(keys, queries)
        for share in SHARES[context]:
            index.parameters = replace(GraphParameters(), scanned=share, scan_factor=FACTOR)
            found = [index.search(q.contiguous(), TOP_K) for q in asked.unbind(1)]
            scanned, followed = (
                torch.stack([getattr(one, name) for one in found]).double().mean().item()
                for name in ("scanned", "followed")
            )
            rows.append(
                {
                    "context_tokens": context,
                    "layer": layer,
                    "keys": keys.shape[1],
                    "share": share,
                    "scanned": scanned,
                    "followed": followed,
                    "followed_each": followed / scanned,
                }
            )
            sys.stdout.write(f"{context:6,d} layer {layer} {share:5.0%} {scanned:8.1f} {followed / scanned:.3f}\n")
            sys.stdout.flush()
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4, 7])
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    rows = [row for context in SHARES for row in rows_of(context, arguments.layers)]
    default = [row["followed_each"] for row in rows if row["scanned"] == FACTOR * TOP_K]
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    report = {
        "schema_version": 1,
        "command": "python benchmarks/retrieval_followed.py " + " ".join(sys.argv[1:]),
        "commit": subprocess.run(git, capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "degree": GraphParameters().degree,
        "top_k": TOP_K,
        "scan_factor": FACTOR,
        "mean_followed_each": sum(default) / len(default),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
