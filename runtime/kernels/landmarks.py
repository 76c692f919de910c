"""What stands for a chunk of keys: its mean, its bounds, and which chunks their mean describes worst."""

import torch
from torch import Tensor

from runtime.kernels.select import chosen_first, top_ids


def chunk_means(keys: Tensor, chunk_tokens: int, seen: Tensor | None = None) -> Tensor:
    """Mean key of each chunk, in the dtype of `keys`: `(..., tokens, head_dim)` -> `(..., chunks, head_dim)`.

    Tokens that bool `seen`, broadcastable to `(..., tokens)`, leaves out (padding) do not count; a chunk without any
    other has mean 0. Raises ValueError unless tokens is a multiple of `chunk_tokens`.
    """
    chunks = _chunked(keys, chunk_tokens)
    if seen is None:
        return chunks.mean(dim=-2, dtype=torch.float32).to(keys.dtype)
    counted = _chunked(seen[..., None], chunk_tokens)
    total = chunks.masked_fill(~counted, 0).sum(dim=-2, dtype=torch.float32)
    return (total / counted.sum(dim=-2).clamp(min=1)).to(keys.dtype)


def chunk_bounds(keys: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Elementwise `(minimum, maximum)` of the keys of each page, each `(..., pages, head_dim)`.

    The last page may be partial.
    """
    missing = -keys.shape[-2] % page_tokens
    full = torch.nn.functional.pad(keys, (0, 0, 0, missing), value=torch.inf)
    low = _chunked(full, page_tokens).amin(dim=-2)
    full = torch.nn.functional.pad(keys, (0, 0, 0, missing), value=-torch.inf)
    return low, _chunked(full, page_tokens).amax(dim=-2)


def outlier_chunks(
    keys: Tensor, means: Tensor, n: int, seen: Tensor | None = None, *, always: Tensor | None = None
) -> Tensor:
    """Ids of the n chunks that their mean describes worst, ascending int64: `(batch, kv_heads, n)`.

    keys `(batch, kv_heads, chunks * chunk_tokens, head_dim)`, means `(batch, kv_heads, chunks, head_dim)`. A chunk is
    described as well as its least similar key: the minimum over its keys of the cosine to the mean (ShadowKV, Sun et
    al. 2024). `seen` as in `chunk_means`; a chunk without any token that counts is none of the n, and where there are
    too few others the ids end in -1. `always` (batch, m) names chunks that are among the n first of all, -1 = none.
    Raises ValueError unless 0 <= n <= chunks.
    """
    chunk_tokens = keys.shape[-2] // means.shape[-2]
    chunks = _chunked(keys, chunk_tokens).float()
    cosine = torch.nn.functional.cosine_similarity(chunks, means[..., None, :].float(), dim=-1)
    if seen is not None:
        cosine = cosine.masked_fill(~_chunked(seen[..., None], chunk_tokens)[..., 0], torch.inf)
    scores = -cosine.amin(dim=-1)
    return top_ids(scores if always is None else chosen_first(scores, always[:, None]), n)


def _chunked(keys: Tensor, chunk_tokens: int) -> Tensor:
    """(..., tokens, head_dim) -> (..., chunks, chunk_tokens, head_dim)."""
    if keys.shape[-2] % chunk_tokens:
        raise ValueError(f"{keys.shape[-2]} tokens are no multiple of chunk_tokens={chunk_tokens}; leave the tail out")
    chunks: Tensor = keys.unflatten(-2, (-1, chunk_tokens))
    return chunks
