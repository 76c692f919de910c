"""The attention function and the mask that Hugging Face calls while a model is bound."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime.kernels.attention import merge, partial_attention
from runtime.layer import HANDLE, TieredLayer
from runtime.masks import allowed

NAME = "kvsim_tiers"  # of the attention function; without the words that Transformers treats specially


_FORWARD = threading.local()  # `stock`: the implementation that this thread's forward is left to


def leave_to(stock: str | None) -> None:
    """This thread's forward has no cache of ours, and is left to the implementation `stock`; None: it has one."""
    _FORWARD.stock = stock


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **given: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hugging Face's attention function; the output is (batch, new_tokens, heads, head_dim).

    Raises ValueError where a layer is asked for what no policy executes.
    """
    handle = getattr(key, HANDLE, None)
    layer = handle() if handle is not None else None
    stock = _stock_function(module) if layer is None else None
    if stock is not None:
        out: tuple[torch.Tensor, torch.Tensor | None] = stock(module, query, key, value, attention_mask, **given)
        return out
    return _own(layer, module, query, key, value, attention_mask, **given)


def _stock_function(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The attention function that this thread's forward is left to; None where it is ours."""
    stock = getattr(_FORWARD, "stock", None)
    if stock is None:
        return None
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get_interface(stock, eager)
    return found


def _own(
    layer: TieredLayer | None,
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
    """The policy's attention; for layers that it leaves alone, attention to what came in."""
    if dropout:
        raise ValueError(f"attention dropout of {dropout} is not executed under offload(); call model.eval()")
    if position_bias is not None:
        raise ValueError("a bias of positions is added to attention, which the runtime does not execute")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    if layer is None:  # a layer of Hugging Face's own cache, or none
        return _dense(query, key, value, allowed(attention_mask), scale, softcap, s_aux, causal=causal)
    if not causal:
        raise ValueError(
            f"layer {layer.index} attends to tokens after its own, so that what it caches would change with each of "
            "them; call the model without kv.cache()"
        )
    out = layer.attend(query, value, attention_mask, scale, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _dense(
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


def mask(**given: Any) -> torch.Tensor | None:
    """Which tokens are real, (batch, 1, 1, tokens), or None where all are: attention itself is causal.

    What is not merely causal (windows, chunks, packed sequences) keeps the mask of scaled dot product attention, and a
    forward that is left to another implementation has that one's. `given` is what Transformers gives mask functions.
    """
    stock = getattr(_FORWARD, "stock", None)
    if stock is not None:
        make = ALL_MASK_ATTENTION_FUNCTIONS.get(stock)
        made: torch.Tensor | None = None if make is None else make(**given)
        return made
    windowed = given.get("local_size") is not None or given.get("kv_offset")
    if windowed or given.get("mask_function", causal_mask_function) is not causal_mask_function:
        own: torch.Tensor | None = sdpa_mask(**given)
        return own
    real: torch.Tensor | None = given.get("attention_mask")
    if real is None or (given["q_length"] > 1 and bool(real.all())):
        return None
    return real[:, None, None, : given["kv_length"]].bool()
