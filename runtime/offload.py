"""`with offload(model, policy) as kv:` plugs a policy into an unmodified Hugging Face model."""

import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from policies import Full, Policy, Step, plan_layer
from policies.plan import Copy, Tier, flops
from runtime.binding import bound, decoder_of
from runtime.cache import TieredCache
from runtime.captured import Replays
from runtime.derived import Plans
from runtime.footprint import Footprint
from runtime.methods import method_of
from runtime.mover import Mover
from runtime.probe import probe
from runtime.recorder import Recorder
from runtime.rotary import UNROTATED
from runtime.saved import load_cache, save_cache
from runtime.shapes import shape_of
from runtime.terms import LONG_PROMPT, Terms, own_layers
from traces.counts import Recording

LOG = logging.getLogger(__name__)
ENDED = "the offload() context of this cache has ended and its memory was given back; generate inside the context"


class Offload:
    """One model under one policy: makes caches, and counts what they move."""

    def __init__(self, model: Any, policy: Policy, max_new_tokens: int, *, capture: bool = False) -> None:
        self.model, self.policy, self.max_new_tokens = model, policy, max_new_tokens
        decoder = decoder_of(model)
        self.seen = probe(model)
        self.shape = shape_of(model, self.seen)
        self.mover, self.recorder, self.footprint = Mover(), Recorder(), Footprint()
        self._ended = False
        self.terms = Terms(
            shape=self.shape,
            seen=self.seen,
            policy=policy,
            plans=Plans(self.shape),
            max_new_tokens=max_new_tokens,
            mover=self.mover,
            recorder=self.recorder,
            footprint=self.footprint,
            decoder=weakref.ref(decoder),
            caches=[],
            replays=Replays() if capture else None,
        )

    def cache(self, prompt_tokens: int | None = None) -> TieredCache:
        """A new, empty cache for one `generate`: pass it as `past_key_values`.

        A prompt that comes in chunks must be announced with its whole length, `prompt_tokens`, padding included.
        """
        if prompt_tokens is not None and prompt_tokens < 1:
            raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1")
        if self._ended:
            raise ValueError(ENDED)
        return TieredCache(self.model.config.get_text_config(), self.terms, self.model.device, prompt_tokens)

    def save(self, cache: TieredCache, path: str | Path, *, unbound: bool = False) -> None:
        """Write a cache whose prompt is complete into a file, from which `load` goes on; see `runtime.saved`.

        The file belongs to the model as it computes now and to the token ids; `unbound` leaves the ids out, as a prompt
        given as embeddings or images needs. Raises ValueError for a cache that cannot be saved, of another context too.
        """
        if not (isinstance(cache, TieredCache) and cache.terms.mover is self.mover):
            raise ValueError(
                f"a {type(cache).__name__} of another context cannot be saved here; use that of kv.cache()"
            )
        save_cache(cache, self.model, Path(path), unbound=unbound)

    def load(
        self,
        path: str | Path,
        *,
        ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        unbound: bool = False,
    ) -> TieredCache:
        """The cache that `save` wrote, under the same model, policy and dtype: pass all ids again, as in a later turn.

        `generate` compares them with the cached ones. For a forward of one's own `ids`, (batch, at least the cached
        tokens), and `attention_mask` are compared here. `unbound`: compare nothing, and take files without ids. Raises
        ValueError, naming both, where something differs, and for a file that is damaged or no saved cache.
        """
        if unbound and ids is not None:
            raise ValueError("unbound=True compares nothing with ids; leave one of them out")
        if any(given is not None and given.ndim != 2 for given in (ids, attention_mask)):
            raise ValueError("ids and attention_mask must be (batch, tokens); give tensors of two dimensions")
        cache = self.cache()
        load_cache(cache, self.model, Path(path), unbound=unbound)
        if ids is not None or attention_mask is not None:
            cache.heard.check(cache.tokens, ids, attention_mask)
        return cache

    @property
    def caches(self) -> list[TieredCache]:
        """All caches that are still in use."""
        return [cache for reference in self.terms.caches if (cache := reference()) is not None]

    @property
    def moved_bytes(self) -> Counter[tuple[Tier, Tier]]:
        """Bytes that all caches have moved per (source, destination)."""
        return self.mover.moved_bytes

    @property
    def counts(self) -> Recording:
        """Every step of every layer and what data decided in it, sequence by sequence."""
        return self.recorder.recording()

    @property
    def replays(self) -> Replays:
        """How many decode steps were replayed, and how many were not, by reason; none without `capture`."""
        return self.terms.replays or Replays()

    @property
    def footprint_bytes(self) -> Counter[Tier]:
        """Bytes that all living caches hold per tier; when none lives any more, what the last of them held."""
        return self.footprint.last_bytes

    @property
    def peak_footprint_bytes(self) -> Counter[Tier]:
        """The most bytes that all caches together have held, of each tier by itself."""
        return self.footprint.peak_bytes

    def release(self) -> None:
        """Give back the memory of all caches, which cannot be used any more."""
        self._end_caches("the memory of this cache was given back by kv.release(); use a new kv.cache()")

    def end(self) -> None:
        """The context is left."""
        self._ended = True
        self._end_caches(ENDED)

    def _end_caches(self, why: str) -> None:
        held = self.footprint.now_bytes
        for cache in self.caches:
            cache.end(why)
        self.footprint.keep(held)


@contextmanager
def offload(model: Any, policy: Policy, *, max_new_tokens: int = 1024, capture: bool = False) -> Iterator[Offload]:
    """Let `model` keep its KV cache as `policy` says, inside this context; afterwards it is as before.

    Caches are allocated for the prompt and `max_new_tokens`, later turns included. `capture`: decode steps become one
    CUDA graph, which is replayed as long as they are alike; what is changed in the model after it was captured is not
    seen. Steps that cannot be captured run as ever, and a warning and `kv.replays` say why. Raises ValueError for an
    architecture or a policy that the runtime does not execute, before anything is changed, and MemoryError, saying what
    to reduce, when memory runs out inside.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    kv = Offload(model, policy, max_new_tokens, capture=capture)
    rotating = _bind(kv)
    _say_if_idle(kv)
    try:
        with bound(model, rotating, attends=not any(seen.by_itself for seen in kv.seen)):
            try:
                yield kv
            finally:
                kv.end()
    except torch.OutOfMemoryError as error:
        held = ", ".join(f"{tier} {nbytes:,}" for tier, nbytes in kv.footprint_bytes.items())
        raise MemoryError(
            f"out of GPU memory under {policy.name} (its cache held {held} bytes): use a shorter prompt, a smaller "
            "batch, fewer max_new_tokens, prefill in chunks, or a policy that keeps less in HBM"
        ) from error


def _bind(kv: Offload) -> dict[int, str]:
    """Check that every layer that holds all tokens can follow the policy, and that its method executes its plans.

    Returns the attention modules that rotate keys, by layer, when any of them needs keys before their rotation.
    """
    unrotates = False
    for layer, seen in enumerate(kv.seen):
        if seen.refusal:
            raise ValueError(f"{kv.shape.name}: layer {layer} {seen.refusal}; the runtime has no method for it")
        if seen.kind != "full" or seen.shared:
            continue
        prompt = LONG_PROMPT
        for step in (Step(prompt_tokens=prompt, past_tokens=0, new_tokens=prompt), Step.decoding(prompt, 1)):
            plan = plan_layer(kv.policy, kv.shape, step, layer)
            method = method_of(plan.policy)
            if missing := method.missing(plan):
                raise ValueError(f"the runtime's {plan.policy.name} has no kernel for {', '.join(missing)}")
            if seen.by_itself and not method.whole:
                raise ValueError(
                    f"{kv.shape.name}: layer {layer} {seen.by_itself}; such a model follows policies that hand back "
                    f"all keys and values (full, offload-all), and {plan.policy.name} does not"
                )
            if method.unrotates and seen.rotation is None:
                raise ValueError(
                    f"{plan.policy.name} needs keys before their rotation, and how layer {layer} of {kv.shape.name} "
                    "rotates them was not recognised: not in halves, nor in pairs, by angles that the model hands over"
                )
            unrotates |= method.unrotates
    rotating = {i: seen.module for i, seen in enumerate(kv.seen) if seen.rotation not in (None, UNROTATED)}
    return rotating if unrotates else {}


def _say_if_idle(kv: Offload) -> None:
    own = own_layers(kv.seen)
    if own and (kv.policy == Full() or not all(_is_dense(kv, layer) for layer in own)):
        return
    why = f"all {len(own)} that hold all tokens stay dense" if own else "none has full attention"
    LOG.warning("%s applies to no layer of this model: %s has %d, %s", kv.policy.name, kv.shape.name, len(kv.seen), why)


def _is_dense(kv: Offload, layer: int) -> bool:
    """Whether a policy does on a layer what the dense cache does: all tokens in HBM, all of them attended to."""
    step = Step.decoding(LONG_PROMPT, 1)
    plan, dense = (plan_layer(policy, kv.shape, step, layer) for policy in (kv.policy, Full()))
    if plan.counts or any(isinstance(op, Copy) for op in plan.ops):
        return False
    return flops(plan.ops, {}) == flops(dense.ops, {})
