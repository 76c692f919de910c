"""The exact index: every key is scanned."""

from typing import Self

import torch

from runtime.index.base import Found, check_build, grouped


class Flat:
    """One matrix product for each KV head; a group of query heads reads its keys once."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys.float().contiguous()

    @classmethod
    def build(cls, keys: torch.Tensor, queries: torch.Tensor) -> Self:
        """Keep `keys` (kv_heads, n, head_dim) as fp32; the prompt's `queries` are not needed."""
        check_build(keys, queries)
        return cls(keys)

    def search(self, q: torch.Tensor, top_k: int) -> Found:
        """The exact `top_k` of each head of `q` (heads, head_dim)."""
        scores = (grouped(q, self.keys, top_k) @ self.keys.mT).flatten(0, 1)
        best = scores.topk(top_k)
        return Found(best.indices, best.values, torch.full((len(q),), self.keys.shape[1]))
