"""Spherical k-means within segments of a text, for all sequences and KV heads at once; nothing here is random.

A segment's keys are compared with the segment's own clusters alone, and in the last round, `nearest`, with all
(RetroInfer, Chen et al. 2025, arXiv:2505.02922). Sums are taken member by member in the order of tokens, so that a run
can be repeated on a GPU, too, and nothing waits for it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

PRODUCTS = 1 << 26  # keys times clusters whose products are held at once


class Grouped(NamedTuple):
    """Rows in the order of their clusters: `order` (batch, kv_heads, n), and `sizes` (batch, kv_heads, clusters).

    Rows in no cluster come last.
    """

    order: Tensor
    sizes: Tensor

    def sums(self, rows: Tensor) -> Tensor:
        """The sum over each cluster's members of `rows` (batch, kv_heads, n, width): fp32, 0 where there are none."""
        batch, kv_heads, n, width = rows.shape
        ordered = rows.gather(2, self.order[..., None].expand_as(rows)).float()
        lengths = pad(self.sizes, (0, 1))
        lengths[..., -1] = n - self.sizes.sum(dim=-1)
        flat = torch.segment_reduce(ordered.view(-1, width), "sum", lengths=lengths.flatten(), unsafe=True)
        return flat.view(batch, kv_heads, -1, width)[:, :, :-1]


def grouped(members: Tensor, clusters: int) -> Grouped:
    """Order and sizes of `members` (batch, kv_heads, n): the cluster of each row, `clusters` for those in none."""
    sizes = torch.zeros((*members.shape[:2], clusters + 1), dtype=torch.int64, device=members.device)
    sizes.scatter_add_(2, members, torch.ones_like(members))
    return Grouped(members.argsort(dim=2, stable=True), sizes[..., :-1])


class Directions(NamedTuple):
    """Unit vectors of clusters, fp32 (batch, kv_heads, clusters, d), and which have had a member: bool; None: all."""

    units: Tensor
    filled: Tensor | None


def directions(keys: Tensor, live: Tensor | None, clusters: int, each: int, rounds: int) -> Directions:
    """The directions of `clusters` clusters, of which each segment has `each`.

    `keys` (batch, kv_heads, n, d) are fp32, and 0 where bool `live` (batch, n) is False: those are in no cluster (None:
    all are live). Segments share the tokens evenly, and a segment's clusters begin at keys that lie evenly in it. In
    each of the rounds a key goes to the cluster of largest inner product, and a cluster to its members' mean; one that
    runs empty stays where it is.
    """
    kv_heads, n = keys.shape[1:3]
    begin = torch.arange(clusters, device=keys.device) * n // clusters
    found = normalize(keys[:, :, begin], dim=-1)
    filled = None if live is None else live[:, None, begin].expand(-1, kv_heads, -1).clone()
    for first in range(0, clusters, each):
        own, at = slice(first, first + each), slice(first * n // clusters, (first + each) * n // clusters)
        if at.start == at.stop:
            continue
        for _ in range(rounds):
            so_far = Directions(found[:, :, own], None if filled is None else filled[:, :, own])
            members = nearest(keys[:, :, at], None if live is None else live[:, at], so_far)
            groups = grouped(members, each)
            any_member = groups.sizes > 0
            mean = normalize(groups.sums(keys[:, :, at]), dim=-1)
            found[:, :, own] = torch.where(any_member[..., None], mean, found[:, :, own])
            if filled is not None:
                filled[:, :, own] |= any_member
    return Directions(found, filled)


def nearest(keys: Tensor, live: Tensor | None, of: Directions) -> Tensor:
    """The cluster of largest inner product for each key: int64 (batch, kv_heads, n), the number of clusters for a key
    that is not live.

    `keys` and `live` as in `directions`. Where no cluster has had a member, the first is taken.
    """
    clusters = of.units.shape[2]
    rows = max(1, PRODUCTS // (keys.shape[0] * keys.shape[1] * clusters))
    found = []
    for part in keys.split(rows, dim=2):
        products = part @ of.units.mT
        if of.filled is not None:
            products.masked_fill_(~of.filled[:, :, None], -torch.inf)
        found.append(products.argmax(dim=-1))
    members = torch.cat(found, dim=2)
    return members if live is None else members.masked_fill(~live[:, None], clusters)
