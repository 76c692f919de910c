"""Scores of chunks and clusters against the queries: landmark attention mass, upper bounds, shares of centroids."""

from math import log
from typing import Literal

import torch
from torch import Tensor

Reduce = Literal["max", "sum", "mean", "none"]


def landmark_scores(
    q: Tensor,
    landmarks: Tensor,
    *,
    scale: float,
    reduce: Reduce = "max",
    valid: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention mass of each chunk's landmark, reduced over a group's query heads: fp32 `(batch, kv_heads, chunks)`.

    q `(batch, heads, new_tokens, head_dim)`, landmarks `(batch, kv_heads, chunks, head_dim)`. Per query head
    softmax(q . landmark * scale), summed over the new tokens, then `reduce` over the group (ShadowKV, Sun et al. 2024:
    the maximum; RetroInfer: the sum). Chunks that bool `valid`, broadcastable to the result, leaves out score -inf.
    Raises ValueError for shapes that do not fit together and for an unknown `reduce`.
    """
    if q.is_cuda and reduce == "max" and q.shape[2] == 1 and softcap is None:
        from runtime.kernels.scores_triton import fits, largest_mass

        kv_heads, chunks = landmarks.shape[1:3]
        if fits(q.shape[1] // kv_heads, chunks):
            valid = None if valid is None else valid.expand(landmarks.shape[:3])
            return largest_mass(_grouped(q, landmarks), landmarks, valid, scale)
    logits = grouped_logits(q, landmarks) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if valid is not None:
        valid = valid.expand(landmarks.shape[:3])
        logits = logits.masked_fill(~valid[:, :, None, None, :], -torch.inf)
    mass = torch.softmax(logits, dim=-1)
    scores = _reduced(mass.squeeze(3) if q.shape[2] == 1 else mass.sum(dim=3), reduce)
    return scores if valid is None else scores.masked_fill(~valid, -torch.inf)


def bound_scores(
    q: Tensor, low: Tensor, high: Tensor, *, reduce: Reduce = "max", valid: Tensor | None = None
) -> Tensor:
    """Upper bound of q . k over each page, reduced over a group's query heads: fp32 `(batch, kv_heads, pages)`.

    q `(batch, heads, new_tokens, head_dim)`; low, high `(batch, kv_heads, pages, head_dim)` are a page's elementwise
    minimum and maximum. Per query head sum_i max(q_i low_i, q_i high_i), the largest over the new tokens, then
    `reduce` over the group (Quest, Tang et al. 2024), or "none": `(batch, heads, pages)`. `valid` and errors as in
    `landmark_scores`.
    """
    # Which of the two products is larger depends on the sign of q_i alone.
    bounds = grouped_logits(q.clamp(min=0), high) + grouped_logits(q.clamp(max=0), low)
    scores = _reduced(bounds.amax(dim=3), reduce)
    return scores if valid is None else scores.masked_fill(~valid.expand(scores.shape), -torch.inf)


def centroid_scores(
    q: Tensor,
    centroids: Tensor,
    sizes: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    counted: Tensor | None = None,
    group_score: Literal["mean", "max"] = "max",
) -> Tensor:
    """Log of the attention weight of one key of each cluster, were all keys their centroids.

    q `(batch, heads, new_tokens, head_dim)`, centroids `(batch, kv_heads, clusters, head_dim)`, sizes `(batch,
    kv_heads, clusters)` keys each; the result is fp32 `(batch, kv_heads, clusters)`, -inf for empty clusters. Per query
    head exp(q . c) / sum_j sizes_j exp(q . c_j) (Squeezed Attention, Hooper et al. 2024, section 4.2), the mean or the
    largest of a group's heads, then the mean over the new tokens, or over those that bool `counted` (batch, new_tokens)
    names.
    In logs nothing underflows, so scores that differ stay apart. Errors as in `landmark_scores`.
    """
    logits = grouped_logits(q, centroids) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total = torch.logsumexp(logits + sizes.log()[:, :, None, None], dim=-1, keepdim=True)
    each = logits - total
    shares = each.amax(dim=2) if group_score == "max" else torch.logsumexp(each, dim=2) - log(each.shape[2])
    shares = shares.masked_fill((sizes == 0)[:, :, None], -torch.inf)
    if counted is None:
        counted = torch.ones_like(shares[:, 0, :, 0], dtype=torch.bool)
    shares = shares.masked_fill(~counted[:, None, :, None], -torch.inf)
    return torch.logsumexp(shares, dim=2) - counted.sum(dim=1).clamp(min=1).log()[:, None, None]


def grouped_logits(q: Tensor, rows: Tensor) -> Tensor:
    """Products in fp32, (batch, kv_heads, group, new_tokens, rows)."""
    heads, new_tokens = q.shape[1:3]
    grouped = _grouped(q, rows)
    if q.is_cuda:
        from runtime.kernels.scores_triton import products

        flat = products(grouped, rows)
    else:
        flat = grouped.float() @ rows.float().mT
    grouped_scores: Tensor = flat.unflatten(2, (heads // rows.shape[1], new_tokens))
    return grouped_scores


def _grouped(q: Tensor, rows: Tensor) -> Tensor:
    """The queries of each group side by side: (batch, kv_heads, group * new_tokens, head_dim)."""
    batch, heads, new_tokens, head_dim = q.shape
    kv_heads = rows.shape[1]
    if rows.dim() != 4 or rows.shape[0] != batch or rows.shape[3] != head_dim or heads % kv_heads:
        raise ValueError(
            f"q {tuple(q.shape)} must be (batch, heads, new_tokens, head_dim) and the rows scored "
            f"{tuple(rows.shape)} (batch, kv_heads, chunks, head_dim), heads a multiple of kv_heads"
        )
    grouped: Tensor = q.reshape(batch, kv_heads, heads // kv_heads * new_tokens, head_dim)
    return grouped


def _reduced(per_head: Tensor, reduce: Reduce) -> Tensor:
    """(batch, kv_heads, group, chunks) -> (batch, kv_heads, chunks), or for "none" (batch, heads, chunks)."""
    if reduce == "none":
        return per_head.flatten(1, 2)
    if reduce == "max":
        return per_head.amax(dim=2)
    if reduce == "sum":
        return per_head.sum(dim=2)
    if reduce == "mean":
        return per_head.mean(dim=2)
    raise ValueError(f"reduce={reduce!r} is unknown; known are 'max', 'sum', 'mean' and 'none'")
