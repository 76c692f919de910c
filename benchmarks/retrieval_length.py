"""How the query-aware graph's recall at a share of the keys depends on how many keys there are, and on where it starts.

    python benchmarks/retrieval_length.py [--layers 7 6] [--out FILE]

The sets of keys are those of `retrieval_index.py`, in several sizes:
- synthetic, seed 1, 16,384 to 131,072 keys;
- the heads of needle-28m that are concentrated at 32K: one prompt of 8K, 16K and 32K, and, since the model reads no
  more, the keys and queries of two and of four prompts of 32K side by side, asked by the queries of the first.

IVF and HNSW stand beside it, each at the best setting for every share. "Graph from the best ten" begins its search at
the ten keys that score highest, which no search can know: more than that is not to be had from better entry points.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from attention_data import DEVICE, Searched, examples, needle, synthetic
from retrieval_index import (
    CONCENTRATED,
    METRICS,
    SHARES,
    TOP_K,
    best_mass,
    compare,
    setup,
    times,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from runtime.index import Graph, GraphParameters
from runtime.index.measure import quality

OUT = Path(__file__).parent / "results" / "retrieval_length.json"
SIZES = (16384, 32768, 65536, 131072)
PROMPTS = ((8192, 1), (16384, 1), (32768, 1), (32768, 2), (32768, 4))
KNOWN = 10


def side_by_side(parts: Sequence[Searched]) -> Searched:
    """The keys and queries of several prompts as those of one, asked what the first is asked."""
    keys, queries = (torch.cat([part[i] for part in parts], dim=1) for i in (0, 1))
    return keys, queries, parts[0][2]


def sets(layers: Sequence[int]) -> Iterator[tuple[str, list[tuple[Searched, np.ndarray]]]]:
    """Each set's name, and what its layers search with the heads that are reported."""
    for keys in SIZES:
        yield "synthetic", [(synthetic(1, keys), np.array([0]))]
    prompts = {length: [needle(e, layers) for e in examples(length)[:4]] for length in sorted({p[0] for p in PROMPTS})}
    heads = [np.flatnonzero(best_mass(keys, asked) >= CONCENTRATED) for keys, _, asked in prompts[32768][0]]
    for length, count in PROMPTS:
        joined = [side_by_side(parts) for parts in zip(*prompts[length][:count], strict=True)]
        yield f"needle, concentrated heads, {count} x {length}", list(zip(joined, heads, strict=True))


def from_the_best(searched: Searched) -> dict[str, np.ndarray]:
    """Recall and mass (heads, shares) of searches that begin at the best ten keys."""
    keys, queries, asked = searched
    graph, group = Graph.build(keys.to(DEVICE), queries.to(DEVICE)), len(asked) // len(keys)
    points = []
    for share in SHARES:
        parameters, found = replace(GraphParameters(), scanned=share), []
        for q in asked.unbind(1):
            answers = []
            for head, row in enumerate(q):
                own = slice(head // group, head // group + 1)
                best = (keys[own] @ row).topk(KNOWN).indices.int()
                answers.append(Graph(keys[own], graph.links[own], best, parameters).search(row[None], TOP_K))
            found.append((torch.cat([a.ids for a in answers]), torch.cat([a.scanned for a in answers])))
        points.append(quality(found, keys, asked, TOP_K))
    return {name: torch.stack([getattr(point, name) for point in points], dim=1).numpy() for name in METRICS}


def rows(name: str, parts: list[tuple[Searched, np.ndarray]]) -> list[dict[str, object]]:
    """Means over the heads of a set, a record for each method and metric; `None` where a head has no figure."""
    compared = [{**compare(*searched), "graph from the best ten": from_the_best(searched)} for searched, _ in parts]
    seconds = times(*parts[0][0])
    best = np.concatenate([best_mass(keys, asked)[heads] for (keys, _, asked), heads in parts]).mean()
    records: list[dict[str, object]] = []
    for method in compared[0]:
        for metric in METRICS:
            values = np.concatenate([of[method][metric][heads] for of, (_, heads) in zip(compared, parts, strict=True)])
            means = [None if np.isnan(column).any() else round(float(column.mean()), 4) for column in values.T]
            records.append(
                {"set": name, "keys": parts[0][0][0].shape[1], "heads": len(values), "method": method, "metric": metric,
                 "best_mass": round(float(best), 4), **{f"{s:.0%}": m for s, m in zip(SHARES, means, strict=True)},
                 "flat_s": seconds["flat_s"], "graph_3%_s": seconds["graph_3%_s"]}
            )  # fmt: skip
    return records


def table(records: list[dict[str, object]]) -> str:
    """The records as Markdown."""
    columns = ["set", "keys", "heads", "method", "metric", *(f"{share:.0%}" for share in SHARES)]
    lines = ["| " + " | ".join(columns) + " |", "|---|---:|---:|---|---|" + "---:|" * len(SHARES)]
    lines += ["| " + " | ".join("-" if r[c] is None else str(r[c]) for c in columns) + " |" for r in records]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[7, 6])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--commit", help="of the code measured, where there is no repository to ask")
    given = parser.parse_args()
    measured: dict[str, object] = {"schema_version": 1, **setup(given.commit), "rows": []}
    records: list[dict[str, object]] = []
    for name, parts in sets(given.layers):
        records += rows(name, parts)
        given.out.write_text(json.dumps({**measured, "rows": records}, indent=1) + "\n")  # the next takes a while
    sys.stdout.write(table(records) + "\n")


if __name__ == "__main__":
    main()
