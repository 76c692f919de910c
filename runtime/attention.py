"""The attention function and the mask that Hugging Face calls while a model is bound."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, sdpa_mask

from runtime.kernels.attention import merge, partial_attention
from runtime.layer import HANDLE
from runtime.masks import allowed

NAME = "kvsim_tiers"  # of the attention function; without the words that Transformers treats specially


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """Hugging Face's attention function; the output is (batch, new_tokens, heads, head_dim).

    Raises ValueError for dropout, for a bias of positions, and where what is cached attends in both directions.
    """
    if dropout:
        raise ValueError(f"attention dropout of {dropout} is not executed under offload(); call model.eval()")
    if position_bias is not None:
        raise ValueError("a bias of positions is added to attention, which the runtime does not execute")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    handle = getattr(key, HANDLE, None)
    layer = handle() if handle is not None else None
    if layer is None:  # a layer of Hugging Face's own cache, or none
        return _stock(query, key, value, allowed(attention_mask), scale, softcap, s_aux, causal=causal)
    if not causal:
        raise ValueError(
            f"layer {layer.index} attends to tokens after its own, so that what it caches would change with each of "
            "them; call the model without kv.cache()"
        )
    out = layer.attend(query, value, attention_mask, scale, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _stock(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    *,
    causal: bool,
) -> tuple[torch.Tensor, None]:
    """Dense attention for layers that the policy leaves alone: keys and values as Hugging Face's cache gave them."""
    causal = causal and query.shape[2] > 1 and (mask is None or mask.shape[2] == 1)
    part = partial_attention(query, key, value, scale=scale, mask=mask, causal=causal, softcap=softcap)
    out = merge([part], sink_logits=s_aux).to(query.dtype)
    return out.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Which tokens are real, (batch, 1, 1, tokens), or None where all are: attention itself is causal.

    What is not merely causal (windows, chunks, packed sequences) keeps the mask of scaled dot product attention. Raises
    ValueError for a mask of fewer tokens than there are.
    """
    if local_size is None and mask_function is causal_mask_function and not kv_offset:
        if attention_mask is None or (q_length > 1 and bool(attention_mask.all())):
            return None
        return attention_mask[:, None, None, :kv_length].bool()
    made: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )
    return made
