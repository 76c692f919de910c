"""Attention to clusters of keys, estimated from what is kept of each: its mean key, summed values and size."""

import torch
from torch import Tensor

from runtime.kernels.scores import grouped_logits


def estimated_attention(
    q: Tensor,
    centroids: Tensor,
    value_sums: Tensor,
    sizes: Tensor,
    ids: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `q` over the clusters `ids` as if every key were its cluster's mean: `(out, lse)`, both fp32.

    q `(batch, heads, new_tokens, head_dim)`, centroids `(batch, kv_heads, clusters, head_dim)`, value_sums `(batch,
    kv_heads, clusters, v_head_dim)`, sizes `(batch, kv_heads, clusters)` keys each, ids `(batch, kv_heads, n)`, -1 =
    none. A cluster weighs size * exp(q . c) and adds exp(q . c) times its value sum (RetroInfer, Chen et al. 2025);
    as a mean of exponentials is no less than the exponential of the mean, its weight is never too large. Out and lse
    are those of `partial_attention`, to be merged with other parts; an empty cluster weighs nothing.
    """
    at = ids.clamp(min=0).long()
    counted = sizes.gather(2, at).masked_fill(ids < 0, 0)
    means = centroids.gather(2, at[..., None].expand(-1, -1, -1, centroids.shape[3]))
    sums = value_sums.gather(2, at[..., None].expand(-1, -1, -1, value_sums.shape[3]))
    logits = grouped_logits(q, means) * scale  # (batch, kv_heads, group, new_tokens, n)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    each = logits.masked_fill((counted == 0)[:, :, None, None], -torch.inf)
    lse = torch.logsumexp(each + counted.clamp(min=1).log()[:, :, None, None], dim=-1)
    weights = torch.exp(each - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = weights.flatten(2, 3) @ sums.float()
    shape = (*q.shape[:3], value_sums.shape[3])
    return out.view(shape), lse.view(shape[:3])
