"""What the query-aware graph finds for the keys that it scans, beside inverted files and HNSW.

For queries that no index saw: recall of the exact top 100 and the attention mass captured, against the inner products
computed as a share of the keys (centroids, entry points and upper layers included).

    python benchmarks/retrieval_index.py [--context 32768] [--layers 7 6] [--out FILE]
    python benchmarks/retrieval_index.py --model DIR --text FILE [--tokens 7400] [--layers ...] [--out FILE]

The second form measures a model of yours (of Llama's form) on your text, layer by layer, against the same baselines
(`retrieval_model.py`). The first has two sets of keys:
- needle-28m on one niah_multiquery prompt (`attention_data.needle`). A head is concentrated when its exact top 100
  hold half of its attention to these keys, diffuse otherwise. The graph's defaults were chosen on layers 4 and 6;
  layer 7 was not looked at before.
- synthetic, queries out of distribution: 16,384 keys, 8,192 queries to build from, 32 to ask with
  (`attention_data.synthetic` describes them). Seed 0 was for tuning; seeds 1 to 3 are reported.

The tuning of each method (lists; links of HNSW) is chosen for each share of keys as the best one on the very queries
asked, which favours the baselines: the graph has its defaults throughout. Where a method cannot scan as few keys as a
share allows, it has no figure for that head (FAISS's HNSW follows at least `top_k` keys); its mean is over the others.
So `ahead` compares head by head: the graph less the better of both, the mean and the worst head.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import faiss
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from attention_data import ASKED, DEVICE, examples, needle, synthetic
from retrieval_model import measure_model

from runtime.index import Flat, Graph, GraphParameters, Index, Ivf
from runtime.index.measure import Quality, measure, quality

OUT = Path(__file__).parent / "results" / "retrieval_index.json"
SHARES = (0.01, 0.02, 0.03, 0.05, 0.1)
TOP_K = 100
CONCENTRATED = 0.5
LISTS, PROBED = (64, 128, 256, 512), (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12)
LINKS, EFFORTS = (8, 16, 32), (100, 200, 400, 800)  # HNSW: M, efSearch
METRICS = ("recall", "mass")
TUNED_ON = (4, 6)
SEEDS = (1, 2, 3)


def curve(points: list[Quality]) -> dict[str, np.ndarray]:
    """Recall and mass (heads, shares) between measured points; NaN below the least that the method can scan."""
    scanned = torch.stack([p.scanned for p in points], dim=1).numpy()
    values = {name: torch.stack([getattr(p, name) for p in points], dim=1).numpy() for name in METRICS}
    return {
        name: np.stack([np.interp(SHARES, x, y, left=np.nan) for x, y in zip(scanned, table, strict=True)])
        for name, table in values.items()
    }


def best_mass(keys: torch.Tensor, asked: torch.Tensor) -> np.ndarray:
    """The attention that the exact top 100 hold, the mean for each head."""
    nothing = (torch.full((len(asked), TOP_K), -1), torch.zeros(len(asked)))
    return quality([nothing] * asked.shape[1], keys, asked, TOP_K).best_mass.numpy()


def graph_curve(keys: torch.Tensor, queries: torch.Tensor, asked: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """The graph, told how many keys it may scan."""
    index = Graph.build(keys.to(DEVICE), queries.to(DEVICE))
    points = []
    for share in SHARES:
        index.parameters = replace(GraphParameters(), scanned=share)
        points.append(measure(index, keys, asked, TOP_K))
    return [{name: torch.stack([getattr(p, name) for p in points], dim=1).numpy() for name in METRICS}]


def times(keys: torch.Tensor, queries: torch.Tensor, asked: torch.Tensor) -> dict[str, float]:
    """Median seconds of a search for one query of all heads, and of building the graph."""

    def median(index: Index) -> float:
        spent = []
        for q in [asked[:, 0], *asked.unbind(1)]:
            begun = time.perf_counter()
            index.search(q, TOP_K)
            spent.append(time.perf_counter() - begun)
        return statistics.median(spent[1:])

    begun = time.perf_counter()
    graph = Graph.build(keys.to(DEVICE), queries.to(DEVICE))
    found = {"build_s": time.perf_counter() - begun, "flat_s": median(Flat.build(keys, queries))}
    for share in SHARES:
        graph.parameters = replace(GraphParameters(), scanned=share)
        found[f"graph_{share:.0%}_s"] = median(graph)
    return {name: round(seconds, 6) for name, seconds in found.items()}


def ivf_curves(keys: torch.Tensor, queries: torch.Tensor, asked: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """Lists by Euclidean distance (ours) and by inner product (FAISS), of several sizes."""

    def build(rows: np.ndarray, lists: int) -> faiss.Index:
        d = rows.shape[1]
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.add(rows)
        return index

    curves = []
    for lists in LISTS:
        probes = sorted({max(1, round(lists * share)) for share in PROBED})
        index = Ivf.build(keys, queries, lists=lists, probe=1)
        points = []
        for probe in probes:
            index.probe = probe
            points.append(measure(index, keys, asked, TOP_K))
        by_product = [build(rows.numpy(), lists) for rows in keys]
        curves += [curve(points), faiss_curve(by_product, keys, asked, "nprobe", probes, lists)]
    return curves


def hnsw_curves(keys: torch.Tensor, _queries: torch.Tensor, asked: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """FAISS's HNSW on inner products, built from keys alone."""
    curves = []
    for links in LINKS:
        indexes = [faiss.IndexHNSWFlat(keys.shape[2], links, faiss.METRIC_INNER_PRODUCT) for _ in keys]
        for index, rows in zip(indexes, keys, strict=True):
            index.hnsw.efConstruction = 100
            index.add(rows.numpy())
        curves.append(faiss_curve(indexes, keys, asked, "efSearch", EFFORTS, 0))
    return curves


def faiss_curve(
    indexes: list[faiss.Index],
    keys: torch.Tensor,
    asked: torch.Tensor,
    knob: str,
    settings: Sequence[int],
    centroids: int,
) -> dict[str, np.ndarray]:
    """One FAISS index a KV head, `knob` set to each of `settings`; distances to `centroids` are added to its count."""
    group = len(asked) // len(keys)
    points = []
    for setting in settings:
        ids = torch.empty(len(asked), asked.shape[1], TOP_K, dtype=torch.int64)
        scanned = torch.empty(len(asked))
        for head, q in enumerate(asked):
            index = indexes[head // group]
            setattr(index if knob == "nprobe" else index.hnsw, knob, setting)
            stats = faiss.cvar.indexIVF_stats if knob == "nprobe" else faiss.cvar.hnsw_stats
            stats.reset()
            ids[head] = torch.from_numpy(index.search(q.contiguous().numpy(), TOP_K)[1])
            scanned[head] = stats.ndis / len(q) + centroids
        points.append(quality(((part, scanned) for part in ids.unbind(1)), keys, asked, TOP_K))
    return curve(points)


METHODS = {"graph": graph_curve, "ivf": ivf_curves, "hnsw": hnsw_curves}


def compare(keys: torch.Tensor, queries: torch.Tensor, asked: torch.Tensor) -> dict[str, dict[str, np.ndarray]]:
    """For each method recall and mass (heads, shares), the best tuning at each share."""
    found = {name: method(keys, queries, asked) for name, method in METHODS.items()}
    return {
        name: {metric: np.fmax.reduce([c[metric] for c in curves]) for metric in METRICS}
        for name, curves in found.items()
    }


def rows(label: str, compared: dict[str, dict[str, np.ndarray]], heads: np.ndarray) -> list[dict[str, object]]:
    """Means over those of `heads` that have a figure, as records; how far the graph is ahead, head by head."""
    records: list[dict[str, object]] = []
    for metric in METRICS:
        values = {method: compared[method][metric][heads] for method in METHODS}
        ahead = values["graph"] - np.fmax(values["ivf"], values["hnsw"])
        for method, of_heads in {**values, "ahead": ahead, "ahead, worst head": ahead}.items():
            for share, column in zip(SHARES, of_heads.T, strict=True):
                there = column[~np.isnan(column)]
                if len(there):
                    value = there.min() if method == "ahead, worst head" else there.mean()
                    records.append(
                        {"keys": label, "heads": len(heads), "method": method, "scanned": share, "metric": metric,
                         "value": round(float(value), 4), "heads_with_figure": len(there)}
                    )  # fmt: skip
    return records


def table(records: list[dict[str, object]]) -> str:
    """The records as Markdown, a line for each set of keys, metric and method; how many heads have a figure."""
    lines = [
        "| keys (heads) | found | method | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |",
        "|---|---|---|" + "---:|" * len(SHARES),
    ]
    lines_of: dict[tuple[str, object, object], dict[object, str]] = {}
    for record in records:
        key = (f"{record['keys']} ({record['heads']})", record["metric"], record["method"])
        of = "" if record["heads_with_figure"] == record["heads"] else f" ({record['heads_with_figure']})"
        lines_of.setdefault(key, {})[record["scanned"]] = f"{record['value']:.3f}{of}"
    for key, values in lines_of.items():
        lines.append("| " + " | ".join([*map(str, key), *(values.get(share, "-") for share in SHARES)]) + " |")
    return "\n".join(lines)


def join(parts: list[dict[str, dict[str, np.ndarray]]]) -> dict[str, dict[str, np.ndarray]]:
    """The heads of several comparisons, one after another."""
    return {m: {x: np.concatenate([part[m][x] for part in parts]) for x in METRICS} for m in METHODS}


def needle_rows(
    layers: Sequence[int], parts: list[dict[str, dict[str, np.ndarray]]], best: list[np.ndarray]
) -> list[dict[str, object]]:
    """Records of the model's heads: layers tuned on and others apart, concentrated and diffuse heads apart."""
    joined, held, records = join(parts), np.concatenate(best), []
    layer_of = np.repeat(layers[: len(best)], [len(heads) for heads in best])
    for tuned in (False, True):
        for label, chosen in (("concentrated", held >= CONCENTRATED), ("diffuse", held < CONCENTRATED)):
            heads = np.flatnonzero(chosen & (np.isin(layer_of, TUNED_ON) == tuned))
            if len(heads):
                of = " and ".join(map(str, sorted(set(layer_of[heads].tolist()))))
                name = f"needle, layer {of}, {label}, best mass {held[heads].mean():.3f}"
                records += rows(name, joined, heads)
    return records


def setup(commit: str | None) -> dict[str, object]:
    """What the figures hang on; `commit` is asked of git where it is not given."""
    if commit is None:
        ask = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    return {
        "command": f"python {' '.join(sys.argv)}",
        "commit": commit,
        "device": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "model_and_graph_built_on": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "the same",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "faiss-cpu", "numba", "numpy", "transformers")},
        "top_k": TOP_K,
        "asked_per_head": ASKED,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768, help="tokens of the needle-28m prompt")
    parser.add_argument("--layers", type=int, nargs="+", help="7 and 6 of needle-28m, or all of --model")
    parser.add_argument("--model", type=Path, help="a folder that Transformers loads; needs --text")
    parser.add_argument("--text", type=Path, help="what it reads, UTF-8")
    parser.add_argument("--tokens", type=int, default=7400, help="of the text")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="of the code measured, where there is no repository to ask")
    given = parser.parse_args()
    if (given.model is None) != (given.text is None):
        parser.error("--model and --text go together")
    if given.model is not None:
        out = given.out or OUT.with_name("retrieval_model.json")
        command = f"python benchmarks/retrieval_index.py --model DIR --text FILE --tokens {given.tokens}"
        about = {**setup(given.commit), "command": command}
        try:
            found = measure_model(given.model, given.text, given.tokens, given.layers or [], out, about)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        sys.stdout.write(found + "\n")
        return
    given.layers, given.out = given.layers or [7, 6], given.out or OUT
    measured: dict[str, object] = {"schema_version": 1, **setup(given.commit)}
    synthetic_rows = rows("synthetic", join([compare(*synthetic(seed)) for seed in SEEDS]), np.arange(len(SEEDS)))
    parts, best = [], []
    for keys, queries, asked in needle(examples(given.context)[0], given.layers):
        if not parts:
            measured["seconds"] = times(keys, queries, asked)
        parts.append(compare(keys, queries, asked))
        best.append(best_mass(keys, asked))
        measured["rows"] = records = synthetic_rows + needle_rows(given.layers, parts, best)
        given.out.write_text(json.dumps(measured, indent=1) + "\n")  # after each layer: the next takes minutes
        sys.stdout.write(table(records) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
