"""Recall by layer of a model of the user's own: the graph, inverted files and HNSW at equal shares of keys scanned.

`retrieval_index.py --model DIR --text FILE` runs it; every tuning of the baselines is chosen on the queries asked.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import torch
from attention_data import SINKS, WINDOW, Searched, attended
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime.index import Graph, GraphParameters
from runtime.index.clusters import kmeans

SHARES = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)
ASKED, TOP_K = 64, 100
LISTS = (8, 16, 32, 64, 128, 256, 512)
LINKS, EFFORTS = (8, 16, 32), (100, 200, 400, 800, 1600)  # HNSW: M, efSearch
METHODS = ("graph", "ivf", "hnsw")


def text_attention(folder: Path, text: Path, tokens: int, layers: list[int]) -> tuple[list[int], Iterator[Searched]]:
    """The layers (all, if none are given) and what each searches: the last 64 of the first `tokens` of a text ask.

    `ValueError` if the text is shorter, or the model has fewer positions, no such layer or another form than Llama's.
    """
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    if ids.shape[1] < tokens:
        raise ValueError(f"{text.name} has {ids.shape[1]} tokens; give a text of at least {tokens}, or fewer --tokens")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if model.config.model_type != "llama":  # others may norm or rotate queries and keys in their own way
        raise ValueError(f"the model is of type {model.config.model_type}; only models of type llama are measured")
    positions, count = model.config.max_position_embeddings, model.config.num_hidden_layers
    if tokens <= WINDOW + SINKS + TOP_K:
        raise ValueError(f"--tokens {tokens} leaves fewer than {TOP_K} keys; give more than {WINDOW + SINKS + TOP_K}")
    if tokens > positions:
        raise ValueError(f"the model has {positions} positions; give --tokens {positions} or fewer, not {tokens}")
    if beyond := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(f"the model has layers 0 to {count - 1}, and no layer {beyond[0]}")
    chosen = layers or list(range(count))
    return chosen, iter(attended(model, ids[0, :tokens], chosen, asked=ASKED))


def found_of(keys: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Which keys (n, d) are the exact best of each query (group, n_queries, d): 0 or 1, fp32 (group, n_queries, n)."""
    scores = asked @ keys.T
    return torch.zeros_like(scores).scatter_(2, scores.topk(TOP_K).indices, 1.0)


def graph_recall(keys: torch.Tensor, queries: torch.Tensor, asked: torch.Tensor, wanted: torch.Tensor) -> np.ndarray:
    """The graph at its defaults, told how many keys it may scan: (group, shares)."""
    index, columns = Graph.build(keys[None], queries), []
    for share in SHARES:
        index.parameters = replace(GraphParameters(), scanned=share)
        found = [index.search(q.contiguous(), TOP_K) for q in asked.unbind(1)]
        hits = wanted.gather(2, torch.stack([f.ids for f in found], dim=1)).sum(2) / TOP_K
        within = np.ceil(share * len(keys))  # who must scan more to find 100 has no figure
        scanned = torch.stack([f.scanned for f in found], dim=1)
        columns.append(hits.mean(1).masked_fill((scanned > within).any(1), torch.nan))
    return torch.stack(columns, dim=1).numpy()


def ivf_recall(keys: torch.Tensor, _queries: torch.Tensor, asked: torch.Tensor, wanted: torch.Tensor) -> np.ndarray:
    """Lists by Euclidean distance (ours) and by inner product (FAISS), probed one after another: (group, shares)."""
    best = np.full((len(asked), len(SHARES)), np.nan)
    for lists in LISTS:
        euclidean = kmeans(keys[None], lists, rounds=10, seed=0)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(keys.shape[1]), keys.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1
        index.train(keys.numpy())
        centroids = torch.from_numpy(index.quantizer.reconstruct_n(0, lists))
        by_product = (centroids, (keys @ centroids.T).argmax(1))
        for centres, members in ((euclidean.centroids[0], euclidean.members[0]), by_product):
            sizes = torch.bincount(members, minlength=lists)
            order = (asked @ centres.T).masked_fill(sizes == 0, -torch.inf).argsort(2, descending=True)
            held = wanted.new_zeros(*wanted.shape[:2], lists).scatter_add_(2, members.expand(wanted.shape), wanted)
            recall = held.gather(2, order).cumsum(2).mean(1) / TOP_K
            scanned = (sizes[order].cumsum(2).float().mean(1) + lists) / len(keys)
            best = np.fmax(best, between(scanned.numpy(), recall.numpy()))
    return best


def hnsw_recall(keys: torch.Tensor, _queries: torch.Tensor, asked: torch.Tensor, wanted: torch.Tensor) -> np.ndarray:
    """FAISS's HNSW on inner products: (group, shares)."""
    best = np.full((len(asked), len(SHARES)), np.nan)
    for links in LINKS:
        index = faiss.IndexHNSWFlat(keys.shape[1], links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 100
        index.add(keys.numpy())
        scanned, recall = np.zeros((2, len(asked), len(EFFORTS)))
        for column, effort in enumerate(EFFORTS):
            index.hnsw.efSearch = effort
            for head, q in enumerate(asked):
                faiss.cvar.hnsw_stats.reset()
                ids = torch.from_numpy(index.search(q.contiguous().numpy(), TOP_K)[1])
                scanned[head, column] = faiss.cvar.hnsw_stats.ndis / len(q) / len(keys)
                hits = wanted[head].gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0)
                recall[head, column] = hits.sum(1).mean() / TOP_K
        best = np.fmax(best, between(scanned, recall))
    return best


def between(scanned: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Recall at each share between measured points, head by head; NaN below the least that was scanned."""
    return np.stack([np.interp(SHARES, x, y, left=np.nan) for x, y in zip(scanned, recall, strict=True)])


def layer_record(layer: int, searched: Searched) -> dict[str, object]:
    """Recall of each method by share, a figure for each query head; None where it cannot scan so few keys."""
    keys, queries, asked = searched
    group = len(asked) // len(keys)
    recall: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
    for kv_head, rows in enumerate(keys):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        wanted = found_of(rows, asked[heads])
        for method, measured in zip(METHODS, (graph_recall, ivf_recall, hnsw_recall), strict=True):
            recall[method].append(measured(rows, queries[heads], asked[heads], wanted))
    rounded = {m: [[None if np.isnan(x) else round(float(x), 4) for x in h] for h in np.concatenate(r)]
               for m, r in recall.items()}  # fmt: skip
    return {"layer": layer, "keys": keys.shape[1], "recall": rounded}


def layers_table(records: list[dict[str, object]]) -> str:
    """A line for each layer in Markdown: the graph's mean over heads, in parentheses the better baseline's."""
    lines = [
        "| layer | " + " | ".join(f"{share:.0%}" for share in SHARES) + " | worst head |",
        "|---:|" + "---:|" * (len(SHARES) + 1),
    ]
    for record in records:
        recall: dict[str, list[list[float | None]]] = record["recall"]  # type: ignore[assignment]
        graph, ivf, hnsw = (np.array(recall[method], dtype=float) for method in METHODS)
        best = np.fmax(ivf, hnsw)
        pairs = zip(graph.mean(0), best.mean(0), strict=True)
        cells = [f"{figure(ours)} ({figure(theirs)})" for ours, theirs in pairs]
        ahead = np.where(np.isnan(graph - best), np.inf, graph - best).min(0)
        worst = f"{100 * ahead.min():+.1f} at {SHARES[ahead.argmin()]:.0%}"
        lines.append(f"| {record['layer']} | " + " | ".join([*cells, worst]) + " |")
    return "\n".join(lines)


def figure(mean: float) -> str:
    """Three digits, or a dash where a head has no figure."""
    return "-" if np.isnan(mean) else f"{mean:.3f}"


def measure_model(folder: Path, text: Path, tokens: int, layers: list[int], out: Path, setup: dict[str, object]) -> str:
    """Measure layer by layer; the file is written after each, for the next takes a while. Returns the table."""
    records: list[dict[str, object]] = []
    given = {
        "model": folder.resolve().name,
        "text_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "tokens": tokens,
        "asked_per_head": ASKED,
    }
    chosen, searched = text_attention(folder, text, tokens, layers)
    for layer, tensors in zip(chosen, searched, strict=True):
        records.append(layer_record(layer, tensors))
        measured = {"schema_version": 1, **setup, **given, "shares": SHARES, "layers": records}
        out.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    return layers_table(records)
