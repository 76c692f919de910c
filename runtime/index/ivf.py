"""An inverted file: keys in lists by their nearest centroid; a search scans the lists whose centroids score best."""

from typing import Self

import torch

from runtime.index.base import Found, check_build, grouped
from runtime.index.clusters import Clusters, kmeans


class Ivf:
    """The lists of each KV head; all heads of a layer are searched in one pass."""

    def __init__(self, keys: torch.Tensor, clusters: Clusters, probe: int) -> None:
        kv_heads, n, head_dim = keys.shape
        lists = clusters.centroids.shape[1]
        self.shape, self.probe, self.centroids = (n, head_dim), probe, clusters.centroids
        self.ids = clusters.members.argsort(dim=1, stable=True)  # keys in the order of their lists
        self.keys = keys.gather(1, self.ids[..., None].expand(-1, -1, head_dim))
        sizes = torch.zeros(kv_heads, lists, dtype=torch.int64)
        self.sizes = sizes.scatter_add_(1, clusters.members, torch.ones_like(clusters.members))
        self.starts = self.sizes.cumsum(1) - self.sizes

    @classmethod
    def build(
        cls, keys: torch.Tensor, queries: torch.Tensor, *, lists: int, probe: int, rounds: int = 10, seed: int = 0
    ) -> Self:
        """Cluster `keys` (kv_heads, n, head_dim) into `lists`; a search scans `probe` of them.

        The prompt's `queries` are not needed. `ValueError` unless 1 <= probe <= lists <= n.
        """
        check_build(keys, queries)
        if not 1 <= probe <= lists:
            raise ValueError(f"probe={probe} is not between 1 and lists={lists}")
        keys = keys.float()
        clusters = kmeans(keys, lists, rounds=rounds, seed=seed)
        return cls(keys.cpu(), Clusters(clusters.centroids.cpu(), clusters.members.cpu()), probe)

    def search(self, q: torch.Tensor, top_k: int) -> Found:
        """The best of the probed lists for each head of `q` (heads, head_dim); `scanned` has the centroids too."""
        n, head_dim = self.shape
        query = grouped(q, self.keys, top_k)
        kv_heads, group, _ = query.shape
        lists = self.centroids.shape[1]
        probed = (query @ self.centroids.mT).topk(self.probe).indices.view(kv_heads, group * self.probe)
        sizes, starts = self.sizes.gather(1, probed), self.starts.gather(1, probed)
        # The rows of all probed lists of all heads, one after another: ragged, so that no list is padded.
        starts = starts + torch.arange(kv_heads)[:, None] * n
        sizes, starts = sizes.flatten(), starts.flatten()
        before = sizes.cumsum(0) - sizes
        rows = torch.arange(int(sizes.sum())) + (starts - before).repeat_interleave(sizes)
        per_head = sizes.view(-1, self.probe).sum(1)
        head = torch.arange(len(q)).repeat_interleave(per_head)
        scores = torch.einsum("rd,rd->r", self.keys.view(-1, head_dim)[rows], query.reshape(-1, head_dim)[head])
        column = torch.arange(len(rows)) - (per_head.cumsum(0) - per_head).repeat_interleave(per_head)
        width = max(int(per_head.max()), top_k)
        table = torch.full((len(q), width), -torch.inf)
        table[head, column] = scores
        ids = torch.full((len(q), width), -1)
        ids[head, column] = self.ids.view(-1)[rows]
        best = table.topk(top_k)
        return Found(ids.gather(1, best.indices), best.values, per_head + lists)
