"""An inverted file: keys in lists by their nearest centroid; a search scans the lists whose centroids score best."""

from typing import NamedTuple, Self

import torch

from runtime.index.base import Found, check_build, grouped
from runtime.index.clusters import kmeans
from runtime.kernels.select import NONE


class Lists(NamedTuple):
    """The tensors of an inverted file; list i of a KV head has its rows `starts[i]` to `starts[i + 1]`."""

    keys: torch.Tensor  # fp32 (kv_heads, n, head_dim), in the order of the lists
    ids: torch.Tensor  # int32 (kv_heads, n), which key each row is; -1 where it is none
    centroids: torch.Tensor  # fp32 (kv_heads, lists, head_dim)
    starts: torch.Tensor  # int32 (kv_heads, lists + 1)

    def arrange(self, *, first: int = 0, rounds: int, seed: int) -> None:
        """Cluster the keys from row `first` on and put them in the order of their lists, where they are.

        With fewer keys than lists, the last lists are empty. `ids`, `centroids` and `starts` are overwritten.
        """
        real, most = self.keys[:, first:], self.centroids.shape[1]
        self.ids.fill_(NONE)
        self.starts.fill_(first)
        lists = min(most, real.shape[1])
        if not lists:
            return
        centroids, members = kmeans(real, lists, rounds=rounds, seed=seed)
        order = members.argsort(dim=1, stable=True)
        for keys, places in zip(real, order, strict=True):  # a KV head at a time needs least room beside them
            keys.copy_(keys[places])
        self.ids[:, first:] = order + first
        self.centroids[:, :lists] = centroids
        self.centroids[:, lists:] = 0
        sizes = torch.zeros_like(self.starts[:, 1:]).scatter_add_(
            1, members, torch.ones_like(members, dtype=torch.int32)
        )
        self.starts[:, 1:] += sizes.cumsum(1)


class Ivf:
    """The lists of each KV head; all heads of a layer are searched in one pass, `probe` lists each."""

    def __init__(self, lists: Lists, probe: int) -> None:
        self.lists, self.probe = lists, probe

    @classmethod
    def build(
        cls, keys: torch.Tensor, queries: torch.Tensor, *, lists: int, probe: int, rounds: int = 10, seed: int = 0
    ) -> Self:
        """Cluster `keys` (kv_heads, n, head_dim) into `lists`; a search scans `probe` of them.

        Runs where the keys are; the lists end up in host memory. The prompt's `queries` are not needed. `ValueError`
        unless 1 <= probe <= lists <= n.
        """
        check_build(keys, queries)
        kv_heads, n, head_dim = keys.shape
        if not 1 <= probe <= lists:
            raise ValueError(f"probe={probe} is not between 1 and lists={lists}")
        if lists > n:
            raise ValueError(f"lists={lists} is not between 1 and the {n} keys of a KV head")
        built = Lists(
            keys=keys.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
            ids=torch.empty(kv_heads, n, dtype=torch.int32, device=keys.device),
            centroids=torch.empty(kv_heads, lists, head_dim, device=keys.device),
            starts=torch.empty(kv_heads, lists + 1, dtype=torch.int32, device=keys.device),
        )
        built.arrange(rounds=rounds, seed=seed)
        return cls(Lists(*(tensor.cpu() for tensor in built)), probe)

    def search(self, q: torch.Tensor, top_k: int) -> Found:
        """The best of the probed lists for each head of `q` (heads, head_dim); `scanned` has the centroids too."""
        keys, ids_of_rows, centroids, bounds = self.lists
        query = grouped(q, keys, top_k)
        kv_heads, group, head_dim = query.shape
        n, lists = keys.shape[1], centroids.shape[1]
        all_sizes = bounds.diff(dim=1).long()
        nearness = (query @ centroids.mT).masked_fill(all_sizes[:, None] == 0, -torch.inf)  # an empty list is no help
        probed = nearness.topk(self.probe).indices.view(kv_heads, group * self.probe)
        sizes, starts = all_sizes.gather(1, probed), bounds[:, :-1].long().gather(1, probed)
        # The rows of all probed lists of all heads, one after another: ragged, so that no list is padded.
        starts = starts + torch.arange(kv_heads)[:, None] * n
        sizes, starts = sizes.flatten(), starts.flatten()
        before = sizes.cumsum(0) - sizes
        rows = torch.arange(int(sizes.sum())) + (starts - before).repeat_interleave(sizes)
        per_head = sizes.view(-1, self.probe).sum(1)
        head = torch.arange(len(q)).repeat_interleave(per_head)
        scores = torch.einsum("rd,rd->r", keys.view(-1, head_dim)[rows], query.reshape(-1, head_dim)[head])
        column = torch.arange(len(rows)) - (per_head.cumsum(0) - per_head).repeat_interleave(per_head)
        width = max(int(per_head.max()), top_k)
        table = torch.full((len(q), width), -torch.inf)
        table[head, column] = scores
        ids = torch.full((len(q), width), NONE)
        ids[head, column] = ids_of_rows.reshape(-1)[rows].long()
        best = table.topk(top_k)
        return Found(ids.gather(1, best.indices), best.values, per_head + lists)
