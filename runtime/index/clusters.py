"""k-means over the keys of every KV head at once."""

from typing import NamedTuple

import torch


class Clusters(NamedTuple):
    """Centroids and the cluster of each key."""

    centroids: torch.Tensor  # fp32 (kv_heads, lists, head_dim)
    members: torch.Tensor  # int64 (kv_heads, n), the cluster of each key


def kmeans(keys: torch.Tensor, lists: int, *, rounds: int, seed: int) -> Clusters:
    """Lloyd's algorithm from `lists` keys drawn by `seed`; a cluster that runs empty keeps its centroid.

    `keys` are fp32 (kv_heads, n, head_dim). Euclidean distance: on keys of unequal norm, lists of largest inner
    product would gather around the few longest. `ValueError` unless `lists` is between 1 and n.
    """
    kv_heads, n, head_dim = keys.shape
    if not 1 <= lists <= n:
        raise ValueError(f"lists={lists} is not between 1 and the {n} keys of a KV head")
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:lists].to(keys.device)
    centroids = keys[:, drawn]
    for _ in range(rounds):
        members = _nearest(keys, centroids)
        sums = torch.zeros_like(centroids).scatter_add_(1, members[..., None].expand(-1, -1, head_dim), keys)
        sizes = keys.new_zeros(kv_heads, lists).scatter_add_(1, members, keys.new_ones(kv_heads, n))[..., None]
        centroids = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
    return Clusters(centroids, _nearest(keys, centroids))


def _nearest(keys: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    half_squares = centroids.square().sum(2)[:, None] / 2
    return torch.cat([(part @ centroids.mT - half_squares).argmax(2) for part in torch.split(keys, 4096, dim=1)], dim=1)
