"""RetrievalAttention's query-aware graph: keys that the prompt's queries score alike lead to each other.

Decode queries are not distributed as keys are, so lists and graphs of keys alone miss what they look for. The prompt's
own queries are distributed like them: what each of them finds says which keys belong together (arXiv:2409.10516,
section 3.2; the projection onto keys is RoarGraph's, arXiv:2408.08933), and how differently they score two keys says
how far apart these are.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from runtime.index.base import Found, check_build, grouped
from runtime.index.clusters import kmeans
from runtime.index.links import as_scored, closest, co_found, exact_nearest, prune, reversed_links
from runtime.index.reach import connect


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphParameters:
    """How the graph is built, and how far a search goes."""

    degree: int = 16  # links of a key
    scanned: float = 0.02  # share of the keys that a search scans at most; entry points count
    scan_factor: int = 1  # keys that it may scan in any case for each that it is to find
    stop_gain: float = 0.0  # a head stops when 64 keys add less than this share to the attention mass met; 0: never
    train_queries: int = 8192  # of the prompt, evenly spaced, for each KV head
    nearest: int = 32  # keys that each of them finds
    candidates: int = 64  # of the keys themselves by inner product, among which the links of a key are chosen
    alike: int = 8  # and those that the queries score most like it
    entries: int = 32  # keys at which a search begins, at most
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("degree", "scan_factor", "train_queries", "nearest", "candidates", "alike", "entries"):
            if getattr(self, name) < (least := 2 if name == "degree" else 1):
                raise ValueError(f"{name}={getattr(self, name)} is below {least}")
        if not 0 < self.scanned <= 1:
            raise ValueError(f"scanned={self.scanned} is not a share; give more than 0 and at most 1")
        if not 0 <= self.stop_gain < 1:
            raise ValueError(f"stop_gain={self.stop_gain} is not a share; give 0 (never) or more, below 1")


class Graph:
    """One graph for each KV head, shared by its query heads; all heads are searched in one call, in all threads."""

    def __init__(
        self,
        keys: torch.Tensor,
        links: torch.Tensor,
        entries: torch.Tensor,
        parameters: GraphParameters,
        padding: torch.Tensor | None = None,
    ) -> None:
        """Search what `link` made of `keys` fp32 (kv_heads, n, head_dim), all in host memory.

        The first `padding` (kv_heads,) keys of each head are never scanned nor found.
        """
        self.keys, self.links, self.entries, self.parameters = keys, links, entries, parameters
        self.padding = torch.zeros(len(keys), dtype=torch.int64) if padding is None else padding

    @classmethod
    def build(cls, keys: torch.Tensor, queries: torch.Tensor, parameters: GraphParameters | None = None) -> Self:
        """Link `keys` (kv_heads, n, head_dim) by what `queries` (heads, n_queries, head_dim) of the prompt find.

        Runs where the tensors are; the graph ends up in host memory.
        """
        parameters = parameters or GraphParameters()
        links, entries = link(keys, queries, parameters)
        return cls(keys.float().cpu().contiguous(), links.cpu(), entries.cpu(), parameters)

    def search(self, q: torch.Tensor, top_k: int) -> Found:
        """Follow the links of the best key met, again and again, until the allowance of distances is spent.

        `q` is (heads, head_dim). No key is scanned twice, nor are its links read twice. Where no links are left to
        follow, the last key that was not seen is next: a search that may scan everything is exact.
        """
        from runtime.index.descent import best_first  # the compiler takes a while to load

        query = grouped(q, self.keys, top_k).reshape(q.shape).contiguous()
        share = math.ceil(self.parameters.scanned * self.keys.shape[1])
        allowance = max(share, self.parameters.scan_factor * top_k)
        ids = np.full((len(q), top_k), -1, np.int64)
        scores = np.full((len(q), top_k), -np.inf, np.float32)
        scanned, followed = np.zeros(len(q), np.int64), np.zeros(len(q), np.int64)
        best_first(
            query.numpy(),
            self.keys.numpy(),
            self.links.numpy(),
            self.entries.numpy(),
            self.padding.numpy(),
            allowance,
            self.parameters.stop_gain,
            ids,
            scores,
            scanned,
            followed,
        )
        return Found(*map(torch.from_numpy, (ids, scores, scanned, followed)))


def link(keys: torch.Tensor, queries: torch.Tensor, parameters: GraphParameters) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Graph.build` makes, where the tensors are: links, and the keys at which a search begins.

    Both int32, (kv_heads, n, degree) and (kv_heads, entries); the links lead from there to every key. A key with fewer
    links has itself in their place, which costs nothing; where there are fewer entries, the last repeats.
    """
    check_build(keys, queries)
    keys = keys.float()
    trained = _evenly(queries.float().view(keys.shape[0], -1, *queries.shape[1:]), parameters.train_queries)
    best = _best_of_centres(keys, trained, parameters)
    made = [_link(*head, parameters) for head in zip(keys, trained, best, strict=True)]
    links, entries = (torch.stack(tensors).int() for tensors in zip(*made, strict=True))
    return links, entries


def _link(
    keys: torch.Tensor, queries: torch.Tensor, best: torch.Tensor, parameters: GraphParameters
) -> tuple[torch.Tensor, torch.Tensor]:
    """The links of one KV head (n, degree), and its entries, from which they lead to every key."""
    n, degree = len(keys), parameters.degree
    points = as_scored(keys, queries)
    entries = _entries(best, points, keys @ queries.mean(0), parameters)
    together = co_found(exact_nearest(queries, keys, min(parameters.nearest, n)), n, 3 * degree)
    alike = closest(points, min(parameters.alike + 1, n))
    candidates = torch.cat([exact_nearest(keys, keys, min(parameters.candidates, n)), alike, together], dim=1)
    outgoing = prune(points, candidates, -(-degree * 3 // 4))
    links = prune(points, torch.cat([outgoing, reversed_links(outgoing, 4 * degree)], dim=1), degree)
    return connect(links, entries, alike), entries


def _best_of_centres(keys: torch.Tensor, queries: torch.Tensor, parameters: GraphParameters) -> torch.Tensor:
    """The best key of each centre of the queries: int64 (kv_heads, at most entries)."""
    sample = _evenly(queries[:, None], 128 * parameters.entries)  # enough queries to place the centres
    count = min(parameters.entries, sample.shape[1])
    centres = kmeans(sample, count, rounds=8, seed=parameters.seed).centroids
    return (centres @ keys.mT).argmax(2)


def _entries(
    best: torch.Tensor, points: torch.Tensor, scores: torch.Tensor, parameters: GraphParameters
) -> torch.Tensor:
    """The keys at which a search of one KV head begins: int64 (entries,), the last repeated if there are fewer.

    `best` once each. Where one key dominates it is the best of most centres; up to half of the entries are then the
    keys of largest of `scores` (n,) in clusters of `points`, largest first: what lies far from all `best` would be
    come to late.
    """
    distinct, half = list(dict.fromkeys(best.tolist())), parameters.entries // 2
    if len(distinct) < half:
        clusters = min(half, len(points))
        members = kmeans(points[None], clusters, rounds=8, seed=parameters.seed).members[0]
        met = set(members[distinct].tolist())
        for cluster in torch.bincount(members, minlength=clusters).argsort(descending=True, stable=True).tolist():
            inside = members == cluster
            if len(distinct) < half and cluster not in met and inside.any():
                distinct.append(int(scores.masked_fill(~inside, -torch.inf).argmax()))
    distinct += distinct[-1:] * (parameters.entries - len(distinct))
    return torch.tensor(distinct, device=points.device)


def _evenly(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the rows (kv_heads, group, n, head_dim) of each KV head, evenly spaced along n."""
    group, n = rows.shape[1:3]
    stride = max(1, math.ceil(group * n / most))
    return rows[:, :, ::stride].flatten(1, 2)
