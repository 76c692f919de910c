"""Partial attention over one segment of the KV cache, and the exact merge of such parts.

Every part is normalised over its own keys and comes with its log-sum-exp, so that segments in different memories can
be attended apart and joined afterwards (FlashDecoding). CUDA tensors go to the
Triton kernels of `attention_triton`, all others to the eager reference below.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MASS_QUERIES = 128  # whose weights are held at once where their sum is wanted
MAX_KERNEL_HEAD_DIM = 256  # beyond it (MLA latents) a tile does not fit in shared memory


class Segment(NamedTuple):
    """A part of a cache: k and v `(batch, kv_heads, tokens, head_dim)`, `mask` as in `partial_attention`.

    `held`, int64 (1,) on k's device: only the first so many tokens are there. A kernel reads it where it runs, so that
    a captured launch serves every length. Or `ids`, as in `partial_attention_at`: those tokens alone.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    held: Tensor | None = None
    ids: Tensor | None = None


def attend_segments(
    q: Tensor,
    segments: Sequence[Segment],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of `q` to all keys of disjoint segments, in the dtype of `q`, shaped as q with v's head_dim.

    q `(batch, heads, new_tokens, head_dim)`; every query may attend to every token that a segment holds and its mask
    allows. `sink_logits` and errors as in `merge`; ValueError for a segment with ids and a mask or a length.
    """
    if any(segment.ids is not None and (segment.mask is not None or segment.held is not None) for segment in segments):
        raise ValueError("a segment has ids or a mask and a length, not both")
    if segments and all(_runs_on_triton(q, segment.v) for segment in segments):
        from runtime.kernels.attention_triton import attend_all

        for segment in segments:
            _check_inputs(q, segment.k, segment.v, softcap)
        masks = [_mask_of(q, segment) for segment in segments]
        return attend_all(q, segments, masks, scale=scale, softcap=softcap, sink_logits=sink_logits)
    parts = [_partly(q, segment, scale, softcap) for segment in segments]
    return merge(parts, sink_logits=sink_logits).to(q.dtype)


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of `q` over `k`, `v` alone: `(out, lse)`, both fp32.

    q `(batch, heads, new_tokens, head_dim)`, any strides; k, v `(batch, kv_heads, tokens, head_dim)`. `mask` is bool,
    True = attend, and broadcasts to `(batch, heads or kv_heads, new_tokens, tokens)`. `causal`: the new tokens are
    the last ones of k. Out `(batch, heads, new_tokens, head_dim)`, lse `(batch, heads, new_tokens)`; a query that may
    attend to nothing gets out 0 and lse -inf. Rows that no query may attend to can hold anything, even NaN.
    Raises ValueError for shapes that do not fit together.
    """
    _check_inputs(q, k, v, softcap)
    batch, heads, new_tokens, _ = q.shape
    kv_heads, tokens = k.shape[1:3]
    if causal and new_tokens > tokens:
        raise ValueError(f"{new_tokens} causal new tokens need to be among the keys, but there are only {tokens}")
    grouped = None if mask is None else _grouped_mask(mask, (batch, kv_heads, heads // kv_heads, new_tokens, tokens))
    if _runs_on_triton(q, v):
        from runtime.kernels.attention_triton import attend

        return attend(q, k, v, scale=scale, mask=grouped, causal=causal, softcap=softcap)
    if causal:
        earlier = causal_mask(new_tokens, tokens, q.device)
        grouped = earlier.expand(batch, kv_heads, 1, -1, -1) if grouped is None else grouped & earlier
    return _attend_eager(q, k, v, scale, grouped, softcap)


def partial_attention_at(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`partial_attention` over the rows `ids` of k and v only; no other row is read.

    ids `(batch, kv_heads, n)`, int32 or int64, -1 = none; a row that is named twice counts twice. The other shapes,
    the results and the errors are those of `partial_attention`.
    """
    _check_inputs(q, k, v, softcap)
    if ids.dim() != 3 or ids.shape[:2] != k.shape[:2]:
        raise ValueError(f"ids {tuple(ids.shape)} must be (batch, kv_heads, n) with the k of shape {tuple(k.shape)}")
    if _runs_on_triton(q, v):
        from runtime.kernels.attention_triton import attend

        return attend(q, k, v, scale=scale, ids=ids, softcap=softcap)
    rows = ids.clamp(min=0).long()[..., None]
    chosen_k = k.gather(2, rows.expand(-1, -1, -1, k.shape[3]))
    chosen_v = v.gather(2, rows.expand(-1, -1, -1, v.shape[3]))
    return _attend_eager(q, chosen_k, chosen_v, scale, (ids >= 0)[:, :, None, None, :], softcap)


def merge(parts: Sequence[tuple[Tensor, Tensor]], sink_logits: Tensor | None = None) -> Tensor:
    """Join the `(out, lse)` of disjoint segments into what one softmax over all their keys gives, fp32.

    out `(batch, heads, new_tokens, head_dim)`, lse `(batch, heads, new_tokens)`; a part of lse -inf weighs nothing,
    and where every part does the result is 0. `sink_logits` `(heads,)` enter the softmax without a value (attention
    sinks, gpt-oss). Raises ValueError without parts or when their shapes differ.
    """
    if not parts:
        raise ValueError("merge needs at least one (out, lse) part, but got none")
    shapes = {(tuple(out.shape), tuple(lse.shape)) for out, lse in parts}
    if len(shapes) > 1 or parts[0][0].shape[:-1] != parts[0][1].shape:
        raise ValueError(f"the parts of a merge must have one shape, lse without head_dim; got {sorted(shapes)}")
    heads = parts[0][1].shape[1]
    if sink_logits is not None and tuple(sink_logits.shape) != (heads,):
        raise ValueError(f"sink_logits {tuple(sink_logits.shape)} must be (heads,) = ({heads},)")
    if len(parts) == 1 and sink_logits is None:
        return parts[0][0]
    outs = torch.stack([out for out, _ in parts])
    lses = torch.stack([lse for _, lse in parts])
    if outs.is_cuda:
        from runtime.kernels.attention_triton import merge_stacked

        return merge_stacked(outs, lses, sink_logits)[0]
    return _merge_eager(outs, lses, sink_logits)


def attention_mass(
    q: Tensor, k: Tensor, lse: Tensor, *, scale: float, mask: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The weight that each key gets from all queries, `lse` being what their whole softmax sums to: fp32.

    lse is (batch, heads, new_tokens), the result (batch, heads, tokens); q, k, `mask` and errors as in
    `partial_attention`.
    """
    _check_inputs(q, k, k, softcap)
    batch, heads, new_tokens, _ = q.shape
    kv_heads, tokens = k.shape[1:3]
    group = heads // kv_heads
    grouped = None if mask is None else _grouped_mask(mask, (batch, kv_heads, group, new_tokens, tokens))
    keys, mass = k.float().mT, torch.zeros(batch, kv_heads, group, tokens, device=q.device)
    lse = lse.masked_fill(lse == -torch.inf, 0).unflatten(1, (kv_heads, group))
    for start in range(0, new_tokens, MASS_QUERIES):
        at = slice(start, start + MASS_QUERIES)
        rows = q[:, :, at].float().reshape(batch, kv_heads, -1, q.shape[3])
        scores = (rows @ keys).unflatten(2, (group, -1)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if grouped is not None:
            scores = scores.masked_fill(~grouped[:, :, :, at], -torch.inf)
        mass += torch.exp(scores - lse[:, :, :, at, None]).sum(dim=3)
    return mass.flatten(1, 2)


def causal_mask(new_tokens: int, tokens: int, device: torch.device | str | None = None) -> Tensor:
    """Bool `(new_tokens, tokens)`: each of the last `new_tokens` tokens attends to itself and what comes before."""
    everything = torch.ones(new_tokens, tokens, dtype=torch.bool, device=device)
    return everything.tril(tokens - new_tokens)


def _mask_of(q: Tensor, segment: Segment) -> Tensor | None:
    if segment.mask is None:
        return None
    batch, heads, new_tokens, _ = q.shape
    kv_heads, tokens = segment.k.shape[1:3]
    return _grouped_mask(segment.mask, (batch, kv_heads, heads // kv_heads, new_tokens, tokens))


def _partly(q: Tensor, segment: Segment, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    k, v, ids = segment.k, segment.v, segment.ids
    if ids is not None:
        return partial_attention_at(q, k, v, ids, scale=scale, softcap=softcap)
    return partial_attention(q, k, v, scale=scale, mask=_held_mask(segment), softcap=softcap)


def _held_mask(segment: Segment) -> Tensor | None:
    if segment.held is None:
        return segment.mask
    there = torch.arange(segment.k.shape[2], device=segment.k.device) < segment.held
    return there if segment.mask is None else segment.mask & there


def _attend_eager(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """`mask` broadcasts to (batch, kv_heads, group, new_tokens, tokens)."""
    batch, heads, new_tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    # A group's heads are rows of one product, so K and V are never expanded.
    rows = q.reshape(batch, kv_heads, group * new_tokens, head_dim).float()
    scores = (rows @ k.float().mT).unflatten(2, (group, new_tokens)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
        attended = mask.any(dim=3).any(dim=2)  # a weight of 0 does not hide NaN in a value
        v = v.masked_fill(~attended[..., None], 0)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    out = weights.flatten(2, 3) @ v.float()
    return out.reshape(batch, heads, new_tokens, v.shape[3]), lse.reshape(batch, heads, new_tokens)


def _merge_eager(outs: Tensor, lses: Tensor, sink_logits: Tensor | None) -> Tensor:
    """outs (parts, batch, heads, new_tokens, head_dim), lses (parts, batch, heads, new_tokens)."""
    largest = lses.amax(dim=0)
    if sink_logits is not None:
        sinks = sink_logits.float()[None, :, None]
        largest = torch.maximum(largest, sinks)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weights = torch.exp(lses - largest)
    total = weights.sum(dim=0)
    if sink_logits is not None:
        total = total + torch.exp(sinks - largest)
    weighted = (weights[..., None] * outs).sum(dim=0)
    return weighted / total.masked_fill(total == 0, 1)[..., None]


def _runs_on_triton(q: Tensor, v: Tensor) -> bool:
    return q.is_cuda and max(q.shape[-1], v.shape[-1]) <= MAX_KERNEL_HEAD_DIM


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q {tuple(q.shape)} must be (batch, heads, new_tokens, head_dim), and k {tuple(k.shape)} and "
            f"v {tuple(v.shape)} (batch, kv_heads, tokens, head_dim) of the same batch"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head_dim {q.shape[3]} and k has {k.shape[3]}; they must be equal")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} KV heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, but are {q.dtype}, {k.dtype} and {v.dtype}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive; leave it out for none")


def _grouped_mask(mask: Tensor, shape: tuple[int, int, int, int, int]) -> Tensor:
    """`mask` as a view of (batch, kv_heads, group, new_tokens, tokens)."""
    batch, kv_heads, group, new_tokens, tokens = shape
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; pass bool, True = attend")
    full = mask[(None,) * (4 - mask.dim())]
    try:
        if full.shape[1] == kv_heads * group and group > 1:
            grouped: Tensor = full.unflatten(1, (kv_heads, group))
            return grouped.expand(shape)
        return full.unsqueeze(2).expand(shape)
    except RuntimeError:
        rule = f"({batch}, {kv_heads * group} or {kv_heads}, {new_tokens}, {tokens})"
        raise ValueError(f"mask {tuple(mask.shape)} does not broadcast to {rule}") from None
