"""RetrievalAttention's query-aware graph: keys that one query of the prompt found lead to each other.

Decode queries are not distributed as keys are, so lists and graphs of keys alone miss what they look for. The prompt's
own queries are distributed like them: their exact nearest keys say which keys belong together (arXiv:2409.10516,
section 3.2; the projection onto keys is RoarGraph's, arXiv:2408.08933).
"""

import math
from dataclasses import dataclass
from typing import Self

import torch

from runtime.index.base import Found, check_build, grouped
from runtime.index.clusters import kmeans
from runtime.index.links import closest_keys, co_found, exact_nearest, prune, reversed_links


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphParameters:
    """How the graph is built, and how far a search goes."""

    degree: int = 16  # links of a key
    scanned: float = 0.02  # share of the keys that a search scans at most; entry points count
    beam: int = 4  # keys of each head whose links are followed at once
    stop_gain: float = 0.0  # a head stops when a step adds less than this share to the attention mass found; 0: never
    train_queries: int = 8192  # of the prompt, evenly spaced, for each KV head
    nearest: int = 32  # keys that each of them finds
    hubs: int = 32  # entry points: the keys found most often ...
    medoids: int = 96  # ... and the keys in the middle of this many clusters
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("degree", "beam", "train_queries", "nearest", "hubs", "medoids"):
            if getattr(self, name) < (least := 2 if name == "degree" else 1):
                raise ValueError(f"{name}={getattr(self, name)} is below {least}")
        if not 0 < self.scanned <= 1:
            raise ValueError(f"scanned={self.scanned} is not a share; give more than 0 and at most 1")
        if not 0 <= self.stop_gain < 1:
            raise ValueError(f"stop_gain={self.stop_gain} is not a share; give 0 (never) or more, below 1")


class Graph:
    """One graph for each KV head, shared by its query heads; all heads are searched at once, step by step."""

    def __init__(
        self, keys: torch.Tensor, links: torch.Tensor, entries: torch.Tensor, parameters: GraphParameters
    ) -> None:
        self.keys, self.links, self.entries, self.parameters = keys, links, entries, parameters

    @classmethod
    def build(cls, keys: torch.Tensor, queries: torch.Tensor, parameters: GraphParameters | None = None) -> Self:
        """Link `keys` (kv_heads, n, head_dim) by what `queries` (heads, n_queries, head_dim) of the prompt find.

        Runs where the tensors are; the graph ends up in host memory. One link of each key leads to the key after it in
        the text, so every key can be reached from every other.
        """
        check_build(keys, queries)
        parameters = parameters or GraphParameters()
        keys = keys.float()
        trained = _evenly(queries.float().view(keys.shape[0], -1, *queries.shape[1:]), parameters.train_queries)
        graphs = [_link(k, q, parameters) for k, q in zip(keys, trained, strict=True)]
        links = torch.stack([links for links, _ in graphs]).int().cpu()
        hubs = torch.stack([hubs for _, hubs in graphs])
        entries = torch.cat([hubs, _medoids(keys, parameters)], dim=1).cpu()
        return cls(keys.cpu().contiguous(), links, entries, parameters)

    def search(self, q: torch.Tensor, top_k: int) -> Found:
        """Follow the links of the best keys met, `beam` of them a step, until the allowance of distances is spent.

        `q` is (heads, head_dim). No key is scanned twice. Everything scanned stays in the pool, so a search goes on
        for as long as it may.
        """
        query = grouped(q, self.keys, top_k)
        kv_heads, group, head_dim = query.shape
        heads, n = len(q), self.keys.shape[1]
        query = query.reshape(heads, head_dim, 1)
        allowance = min(n, max(top_k, math.ceil(self.parameters.scanned * n)))
        first_row = (torch.arange(heads) // group * n)[:, None]  # of the head's keys, in the rows of all KV heads
        rows, links = self.keys.view(-1, head_dim), self.links.view(kv_heads * n, -1)
        seen = torch.zeros(heads, n, dtype=torch.bool)
        scanned = torch.zeros(heads, dtype=torch.int64)
        # What was scanned, in its order; the last column takes what is not to be kept.
        pool_ids = torch.full((heads, allowance + 1), -1)
        pool_scores = torch.full((heads, allowance + 1), -torch.inf)
        frontier = pool_scores.clone()  # the scores again, without the keys whose links were followed
        live = torch.ones(heads, 1, dtype=torch.bool)
        entries = self.entries.repeat_interleave(group, dim=0)
        met = entries  # ids that the links of this step lead to
        while live.any():
            met = met.sort(dim=1).values
            fresh = ~seen.gather(1, met)
            fresh[:, 1:] &= met[:, 1:] != met[:, :-1]
            column = scanned[:, None] + fresh.cumsum(1) - 1
            fresh &= column < allowance
            seen.scatter_(1, met, True)
            scores = (rows[first_row + met] @ query).squeeze(2).masked_fill(~fresh, -torch.inf)
            if self.parameters.stop_gain:
                before, added = (torch.logsumexp(part * head_dim**-0.5, 1, True) for part in (pool_scores, scores))
                live &= added > before + math.log(self.parameters.stop_gain)
            column = column.masked_fill(~fresh, allowance)
            pool_ids.scatter_(1, column, met)
            pool_scores.scatter_(1, column, scores)
            frontier.scatter_(1, column, scores)
            scanned += fresh.sum(1)
            chosen = frontier.topk(min(self.parameters.beam, allowance))
            frontier.scatter_(1, chosen.indices, -torch.inf)
            followed = live & (chosen.values > -torch.inf)
            live &= (scanned < allowance)[:, None] & followed.any(1, keepdim=True)
            ids = pool_ids.gather(1, chosen.indices).clamp(min=0)
            met = links[first_row + ids].long()
            # Where there is nothing to follow, back to an entry point, which has been seen.
            met = torch.where((followed & live)[..., None], met, entries[:, :1, None]).flatten(1)
        best = pool_scores.topk(top_k)
        return Found(pool_ids.gather(1, best.indices).masked_fill(best.values == -torch.inf, -1), best.values, scanned)


def _link(keys: torch.Tensor, queries: torch.Tensor, parameters: GraphParameters) -> tuple[torch.Tensor, torch.Tensor]:
    """The links of one KV head (n, degree), and its hubs."""
    n, degree = len(keys), parameters.degree
    found = exact_nearest(queries, keys, min(parameters.nearest, n))
    hubs = torch.bincount(found.flatten(), minlength=n).topk(min(parameters.hubs, n)).indices
    following = (torch.arange(n, device=keys.device) + 1)[:, None] % n
    if n == 1:
        return following, hubs
    close = closest_keys(keys, min(degree * 3 // 2, n - 1))
    candidates = torch.cat([close, co_found(found, n, degree * 3 // 2), reversed_links(close, degree // 2)], dim=1)
    return torch.cat([following, prune(keys, candidates, degree - 1)], dim=1), hubs


def _medoids(keys: torch.Tensor, parameters: GraphParameters) -> torch.Tensor:
    """For each cluster the key nearest its centroid: int64 (kv_heads, medoids)."""
    sample = _evenly(keys[:, None], 64 * parameters.medoids)  # enough keys to place the centroids
    centroids = kmeans(sample, min(parameters.medoids, sample.shape[1]), rounds=8, seed=parameters.seed).centroids
    return (centroids @ keys.mT - keys.square().sum(2)[:, None] / 2).argmax(2)


def _evenly(rows: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` of the rows (kv_heads, group, n, head_dim) of each KV head, evenly spaced along n."""
    group, n = rows.shape[1:3]
    stride = max(1, math.ceil(group * n / most))
    return rows[:, :, ::stride].flatten(1, 2)
