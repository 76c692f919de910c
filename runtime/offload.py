"""`with offload(model, policy) as kv:` plugs a policy into an unmodified Hugging Face model."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from policies import Policy, Step, plan_layer
from policies.plan import Tier
from runtime.cache import HANDLE, LONG_PROMPT, Terms, TieredCache
from runtime.kernels.attention import merge, partial_attention
from runtime.methods import method_of
from runtime.mover import Mover
from runtime.probe import probe
from runtime.recorder import Recorder
from runtime.rotary import angles_of
from runtime.saved import load_cache, save_cache
from runtime.shapes import shape_of
from traces.counts import Recording

NAME = "kvsim_tiers"  # of the attention function; without the words that Transformers treats specially


class Offload:
    """One model under one policy: makes caches, and counts what they move."""

    def __init__(self, model: Any, policy: Policy, max_new_tokens: int) -> None:
        self.model, self.policy, self.max_new_tokens = model, policy, max_new_tokens
        self.seen = probe(model)
        self.shape = shape_of(model, self.seen)
        self.mover, self.recorder = Mover(), Recorder()
        self._caches: list[weakref.ref[TieredCache]] = []

    def cache(self, prompt_tokens: int | None = None) -> TieredCache:
        """A new, empty cache for one `generate`: pass it as `past_key_values`.

        A prompt that comes in chunks must be announced with its whole length, `prompt_tokens`, padding included.
        """
        if prompt_tokens is not None and prompt_tokens < 1:
            raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1")
        terms = Terms(
            shape=self.shape,
            seen=self.seen,
            policy=self.policy,
            max_new_tokens=self.max_new_tokens,
            mover=self.mover,
            recorder=self.recorder,
        )
        cache = TieredCache(self.model.config.get_text_config(), terms, self.model.device, prompt_tokens)
        self._caches.append(weakref.ref(cache))
        return cache

    def save(self, cache: TieredCache, path: str | Path) -> None:
        """Write a cache whose prompt is complete into a file, from which `load` goes on; see `runtime.saved`."""
        save_cache(cache, self.model, Path(path))

    def load(self, path: str | Path) -> TieredCache:
        """The cache that `save` wrote, under the same model, policy and dtype: pass all ids again, as in a later turn.

        Raises ValueError, naming both, where one of them differs, and for a file that is no saved cache.
        """
        cache = self.cache()
        load_cache(cache, self.model, Path(path))
        return cache

    @property
    def caches(self) -> list[TieredCache]:
        """All caches that are still in use."""
        return [cache for reference in self._caches if (cache := reference()) is not None]

    @property
    def moved_bytes(self) -> Counter[tuple[Tier, Tier]]:
        """Bytes that all caches have moved per (source, destination)."""
        return self.mover.moved_bytes

    @property
    def counts(self) -> Recording:
        """Every step of every layer and what data decided in it, sequence by sequence."""
        return self.recorder.recording()

    @property
    def footprint_bytes(self) -> Counter[Tier]:
        """Bytes that all living caches hold per tier."""
        total: Counter[Tier] = Counter()
        for cache in self.caches:
            total.update(cache.arena.allocated_bytes)
        return total

    def release(self) -> None:
        """Give back the memory of all caches."""
        for cache in self.caches:
            cache.release()


@contextmanager
def offload(model: Any, policy: Policy, *, max_new_tokens: int = 1024) -> Iterator[Offload]:
    """Let `model` keep its KV cache as `policy` says, inside this context; afterwards it is as before.

    Caches are allocated for the prompt and `max_new_tokens`, later turns included. Raises ValueError for an
    architecture or a policy that the runtime does not execute, before anything is changed, and MemoryError, saying what
    to reduce, when memory runs out inside.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    kv = Offload(model, policy, max_new_tokens)
    unrotates = _bind(kv)
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    config = model.config.get_text_config()
    before = config._attn_implementation  # noqa: SLF001 - Transformers has no public way to read it
    model.set_attn_implementation(NAME)
    hooks = _listen(model) if unrotates else []
    try:
        yield kv
    except torch.OutOfMemoryError as error:
        held = ", ".join(f"{tier} {nbytes:,}" for tier, nbytes in kv.footprint_bytes.items())
        raise MemoryError(
            f"out of GPU memory under {policy.name} (its cache held {held} bytes): use a shorter prompt, a smaller "
            "batch, fewer max_new_tokens, prefill in chunks, or a policy that keeps less in HBM"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)
        kv.release()


def _bind(kv: Offload) -> bool:
    """Check that every layer that holds all tokens can follow the policy, and that its method executes its plans.

    Returns whether any of them needs keys before their rotation.
    """
    unrotates = False
    for layer, seen in enumerate(kv.seen):
        if seen.kind != "full":
            continue
        if seen.refusal:
            raise ValueError(f"{kv.shape.name}: layer {layer} {seen.refusal}; the runtime has no method for it")
        prompt = LONG_PROMPT
        for step in (Step(prompt_tokens=prompt, past_tokens=0, new_tokens=prompt), Step.decoding(prompt, 1)):
            plan = plan_layer(kv.policy, kv.shape, step, layer)
            method = method_of(plan.policy)
            if missing := method.missing(plan):
                raise ValueError(f"the runtime's {plan.policy.name} has no kernel for {', '.join(missing)}")
            if method.unrotates and seen.rotation is None:
                raise ValueError(
                    f"{plan.policy.name} needs keys before their rotation, and how layer {layer} of {kv.shape.name} "
                    "rotates them was not recognised: not in halves, nor in pairs, by angles that the model hands over"
                )
            unrotates |= method.unrotates
    return unrotates


def _listen(model: Any) -> list[RemovableHandle]:
    """Pass on the angles that each attention module gets, until the handles are removed."""

    def hear(module: torch.nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
        cache, angles = given.get("past_key_values"), angles_of(given.get("position_embeddings"))
        if isinstance(cache, TieredCache) and angles is not None:
            cache.angles(module.layer_idx, *angles)

    attention = (m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention"))
    return [module.register_forward_pre_hook(hear, with_kwargs=True) for module in attention]


def _attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """Hugging Face's attention function; the output is (batch, new_tokens, heads, head_dim)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    handle = getattr(key, HANDLE, None)
    layer = handle() if handle is not None else None
    if layer is None:  # a layer of Hugging Face's own cache, or none
        return _stock(query, key, value, attention_mask, scale, softcap, s_aux)
    out = layer.attend(query, attention_mask, scale, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _stock(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """Dense attention for layers that the policy leaves alone: keys and values as Hugging Face's cache gave them."""
    causal = query.shape[2] > 1 and (mask is None or mask.shape[2] == 1)
    part = partial_attention(query, key, value, scale=scale, mask=mask, causal=causal, softcap=softcap)
    out = merge([part], sink_logits=s_aux).to(query.dtype)
    return out.transpose(1, 2).contiguous(), None


def _mask(
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

    What is not merely causal (windows, chunks, packed sequences) keeps the mask of scaled dot product attention.
    """
    if local_size is None and mask_function is causal_mask_function:
        if attention_mask is None or (q_length > 1 and bool(attention_mask.all())):
            return None
        return attention_mask[:, None, None, :kv_length].bool()
    mask: torch.Tensor | None = sdpa_mask(
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
    return mask
