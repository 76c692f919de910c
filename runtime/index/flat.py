"""The exact index: every key is scanned."""

from typing import Self

import torch

from runtime.index.base import Found, check_build, grouped
from runtime.kernels.select import NONE


class Flat:
    """Keys fp32 (kv_heads, n, head_dim); a group of query heads reads its keys `scans` times, in a product each.

    `padding` (kv_heads,), or None: the first rows of a KV head, which are no keys.
    """

    def __init__(self, keys: torch.Tensor, *, padding: torch.Tensor | None = None, scans: int = 1) -> None:
        self.keys, self.padding, self.scans = keys.float().contiguous(), padding, scans

    @classmethod
    def build(cls, keys: torch.Tensor, queries: torch.Tensor) -> Self:
        """Keep `keys` (kv_heads, n, head_dim) as fp32; the prompt's `queries` are not needed."""
        check_build(keys, queries)
        return cls(keys)

    def search(self, q: torch.Tensor, top_k: int) -> Found:
        """The exact `top_k` of each head of `q` (heads, head_dim)."""
        query, n = grouped(q, self.keys, top_k), self.keys.shape[1]
        scores = torch.cat([part @ self.keys.mT for part in query.chunk(self.scans, dim=1)], dim=1)
        scanned = torch.full((len(q),), n)
        if self.padding is not None:
            scores.masked_fill_(torch.arange(n) < self.padding[:, None, None], -torch.inf)
            scanned -= self.padding.repeat_interleave(query.shape[1])
        best = scores.flatten(0, 1).topk(top_k)
        return Found(best.indices.masked_fill(best.values == -torch.inf, NONE), best.values, scanned)
