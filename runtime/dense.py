"""Exact attention over a contiguous cache: what several methods share."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from runtime.call import Call
from runtime.kernels.attention import causal_mask, merge, partial_attention


def split(kv: torch.Tensor, tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each (batch, kv_heads, tokens, its dimensions), as views of a buffer whose rows are `join`'s."""
    kv = kv[:, :tokens]
    keys, values = kv.unbind(2) if kv.dim() == 5 else (kv[..., :head_dim], kv[..., head_dim:])
    return keys.transpose(1, 2), values.transpose(1, 2)


def join(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Rows of a cache: (batch, tokens, 2, kv_heads, head_dim), or, where values have other dimensions, (..., both).

    Keys and values are (batch, kv_heads, tokens, dimensions); the latter rows (batch, tokens, kv_heads, dimensions).
    """
    if keys.shape[3] == values.shape[3]:
        return torch.stack([keys, values], dim=2).permute(0, 3, 2, 1, 4)
    return torch.cat([keys, values], dim=3).transpose(1, 2)


def write(kv: torch.Tensor, call: Call, first: int) -> None:
    """Put the call's new tokens into a buffer of `join`'s rows from row `first` on."""
    rows = kv[:, first : first + call.step.new_tokens]
    for part, new in zip(split(rows, call.step.new_tokens, call.shape.head_dim), (call.new_k, call.new_v), strict=True):
        part.copy_(new)


def hand_back(call: Call) -> None:
    """In place of `attend`, for a model that attends by itself: copies of all keys and values, joined in a row."""
    call.out = torch.cat(split(call.state["kv"], call.step.tokens, call.shape.head_dim), dim=3)


def append_raw(call: Call) -> None:
    """Put the call's new tokens into the plan's `raw_keys` and `raw_values`, one row per token and KV head."""
    rows = slice(call.step.past_tokens, call.step.tokens)
    call.by_head("raw_keys")[:, :, rows].copy_(call.new_k)
    call.by_head("raw_values")[:, :, rows].copy_(call.new_v)


def attend_raw(call: Call) -> None:
    """Exact attention to the raw keys and values of all tokens so far; a chunked prompt's rows beyond are empty."""
    keys, values = (call.by_head(name)[:, :, : call.step.tokens] for name in ("raw_keys", "raw_values"))
    call.out = attend(call, keys, values, call.mask)


def attend(call: Call, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of the call's queries to keys and values (batch, kv_heads, tokens, head_dim).

    `mask` is (batch, 1, 1, tokens), which keys are real, or None: every query sees all of those but the new tokens
    after its own; or (batch, 1 or heads, new_tokens, tokens), which says everything.
    """
    new, tokens = call.step.new_tokens, keys.shape[2]
    causal = new > 1 and (mask is None or mask.shape[2] == 1)
    plain = call.softcap is None and call.sinks is None
    if plain and causal and mask is None and new == tokens:
        return scaled_dot_product_attention(
            call.q, keys, values, is_causal=True, scale=call.scale, enable_gqa=call.shape.group > 1
        )
    if plain and not (causal and keys.is_cuda):  # there the kernel below needs no mask of new_tokens x tokens
        if causal:
            earlier = causal_mask(new, tokens, keys.device)
            mask = earlier if mask is None else mask & earlier
            mask = mask | ~mask.any(-1, keepdim=True)  # a padding row sees nothing: any finite output will do
        return scaled_dot_product_attention(
            call.q, keys, values, attn_mask=mask, scale=call.scale, enable_gqa=call.shape.group > 1
        )
    part = partial_attention(call.q, keys, values, scale=call.scale, mask=mask, causal=causal, softcap=call.softcap)
    return merge([part], sink_logits=call.sinks).to(call.q.dtype)
