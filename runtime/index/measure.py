"""How much of what attention wants an index finds, and how many keys it scans for it."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from runtime.index.base import Index, grouped


class Quality(NamedTuple):
    """Means over queries, one figure for each query head: fp32 (heads,)."""

    recall: torch.Tensor  # share of the exact top_k that was found
    mass: torch.Tensor  # softmax attention over all keys that falls on what was found
    best_mass: torch.Tensor  # the same of the exact top_k: what no index can exceed
    scanned: torch.Tensor  # inner products computed, as a share of the keys


def measure(index: Index, keys: torch.Tensor, queries: torch.Tensor, top_k: int) -> Quality:
    """Search for each of `queries` (heads, n_queries, head_dim) and compare with the exact answer.

    `keys` (kv_heads, n, head_dim) are those that `index` was built from; softmax scales by 1/sqrt(head_dim).
    """
    found = (index.search(q, top_k) for q in queries.unbind(1))
    return quality(((f.ids, f.scanned) for f in found), keys, queries, top_k)


def quality(
    found: Iterable[tuple[torch.Tensor, torch.Tensor]], keys: torch.Tensor, queries: torch.Tensor, top_k: int
) -> Quality:
    """The same for answers of any index: for each query ids (heads, top_k), -1 = none, and scanned (heads,)."""
    n, head_dim = keys.shape[1:]
    totals = torch.zeros(4, queries.shape[0])
    for (ids, scanned), q in zip(found, queries.unbind(1), strict=True):
        scores = (grouped(q, keys, top_k) @ keys.float().mT).flatten(0, 1)
        attention = torch.softmax(scores * head_dim**-0.5, dim=1)
        wanted, got = torch.zeros_like(scores), torch.zeros(len(scores), n + 1)
        wanted.scatter_(1, scores.topk(top_k).indices, 1.0)
        got = got.scatter_(1, ids.masked_fill(ids < 0, n), 1.0)[:, :n]
        totals += torch.stack(
            [(wanted * got).sum(1) / top_k, (attention * got).sum(1), (attention * wanted).sum(1), scanned / n]
        )
    return Quality(*(totals / queries.shape[1]))
