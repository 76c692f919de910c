"""Which decode steps can be captured, and in words why others cannot."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from policies import Step
from policies.plan import Engine
from runtime.bound import HOST, Bound
from runtime.walk import prepared

if TYPE_CHECKING:
    from runtime.cache import TieredCache


def refusal(cache: "TieredCache", forward: Callable[..., Any]) -> str:
    """Why no decode step of this cache can be captured; empty where it can."""
    if len(cache.own) < len(cache.layers):
        return "layers of Hugging Face's own cache grow from step to step"
    if cache.switches:
        return "the model turns to other rotary angles at some length (LongRoPE)"
    if "position_ids" not in signature(forward).parameters:
        return "the model takes no position_ids"
    for index in cache.own:
        layer = cache.tiered(index)
        if layer.method.captured is None:
            return f"{layer.leaf.name} takes lengths from the host in its decode steps"
        step = Step.decoding(layer.prompt_tokens, 1)
        plan = cache.terms.plans.of(layer.leaf, index).plan(step)
        bound = Bound(plan, prepared(layer.method), cache.arena, index)
        if any(op.lane == HOST for op in bound.ops):
            return f"{layer.leaf.name} works on the CPU in its decode steps"
        if any(op.copy is not None and op.lane != Engine.GATHER for op in bound.ops):
            return f"{layer.leaf.name} copies as many rows as it has tokens"
    decoder = cache.terms.decoder()
    for name, module in decoder.named_modules() if decoder is not None else ():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())  # noqa: SLF001
        if hasattr(module, "_hf_hook") or any(not _own(hook) for hook in hooks):
            return f"a hook of {name or 'the decoder'} would not be called"
    return ""


def refusal_so_late(cache: "TieredCache") -> str:
    """Why a step that comes so late is not captured, where earlier ones were; empty where it can be."""
    for layer in map(cache.tiered, cache.own):
        last = layer.method.captured_tokens
        if last and layer.tokens + 1 - layer.prompt_tokens > last:
            return f"{layer.leaf.name} takes lengths from the host once it has generated more than {last} tokens"
    return ""


def _own(hook: Callable[..., Any]) -> bool:
    of = hook.func if isinstance(hook, partial) else hook
    return of.__module__.startswith("runtime.")


def says_as_before(mask: Any, cache: "TieredCache") -> bool:
    """Whether a mask (batch, tokens) says of cached tokens what was said before, and that the new one is real."""
    real = cache.real_tokens
    if mask is None:
        return real is None
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (cache.arena.batch, cache.tokens + 1):
        return False
    if real is None:
        return bool(mask.all())
    return torch.equal(mask.bool(), torch.nn.functional.pad(real, (0, 1), value=True))
