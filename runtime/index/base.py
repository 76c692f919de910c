"""What an index is asked and what it answers."""

from typing import NamedTuple, Protocol

import torch


class Found(NamedTuple):
    """The best keys of each query head, best first, and what finding them cost."""

    ids: torch.Tensor  # int64 (heads, top_k), rows of the KV head's keys; -1 where the search met fewer keys
    scores: torch.Tensor  # fp32 (heads, top_k), inner products, not scaled; -inf where ids is -1
    scanned: torch.Tensor  # int64 (heads,), inner products computed: with keys, and with centroids or entry points
    followed: torch.Tensor | None = None  # int64 (heads,), keys whose links were read, of a graph


class Index(Protocol):
    """An index over the keys of one layer; query heads `kv_head * group` to `(kv_head + 1) * group - 1` share keys."""

    def search(self, q: torch.Tensor, top_k: int) -> Found:
        """The `top_k` keys of largest inner product for each head of `q` (heads, head_dim)."""
        ...


def check_build(keys: torch.Tensor, queries: torch.Tensor) -> None:
    """`ValueError` unless `keys` are (kv_heads, n, head_dim) and `queries` (heads, n_queries, head_dim)."""
    if keys.dim() != 3 or keys.shape[1] < 1:
        raise ValueError(f"keys have shape {tuple(keys.shape)}; give (kv_heads, n, head_dim) with n of at least 1")
    if queries.dim() != 3 or queries.shape[2] != keys.shape[2] or queries.shape[0] % keys.shape[0]:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)}; give (heads, n_queries, {keys.shape[2]}) "
            f"with heads a multiple of the {keys.shape[0]} KV heads"
        )


def grouped(q: torch.Tensor, keys: torch.Tensor, top_k: int) -> torch.Tensor:
    """`q` (heads, head_dim) as fp32 (kv_heads, group, head_dim); `ValueError` if it or `top_k` does not fit `keys`."""
    kv_heads, n, head_dim = keys.shape
    if q.dim() != 2 or q.shape[1] != head_dim or q.shape[0] % kv_heads:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; give (heads, {head_dim}) with heads a multiple of the {kv_heads} KV heads"
        )
    if not 1 <= top_k <= n:
        raise ValueError(f"top_k={top_k} is not between 1 and the {n} keys of the index")
    return q.float().view(kv_heads, -1, head_dim)
