"""The Hugging Face cache whose layers keep their tokens where a policy's plan says."""

import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from policies import LayerPlan, ModelShape, Policy, Step, plan_layer
from runtime.arena import Arena
from runtime.executor import Call, Executor
from runtime.methods import method_of
from runtime.mover import Mover

HANDLE = "_kvsim_layer"  # attribute of the keys that `update` returns: a weak reference to their layer


class TieredLayer(CacheLayerMixin):
    """One layer: `update` takes the new tokens, and the attention function then runs the plan over them."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: "TieredCache", index: int) -> None:
        super().__init__()
        self._cache, self._index = weakref.ref(cache), index
        self._tokens = 0
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the layer's buffers for the whole generation."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.cache.allocate(self._index, key_states.shape[2], key_states)
        self.is_initialized = True

    @property
    def cache(self) -> "TieredCache":
        """The cache that the layer belongs to."""
        cache = self._cache()
        if cache is None:
            raise RuntimeError("the cache of this layer no longer exists; keep `kv.cache()` while generating")
        return cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new tokens, (batch, kv_heads, new_tokens, head_dim) each, and hand them on with a handle."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._new = (key_states, value_states)
        handed = key_states.view_as(key_states)
        setattr(handed, HANDLE, weakref.ref(self))
        return handed, value_states

    def attend(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Run the layer's plan for the tokens of the last `update`; (batch, heads, new_tokens, head_dim)."""
        if self._new is None:
            raise RuntimeError("attention without new tokens: call update first")
        (new_k, new_v), self._new = self._new, None
        past, new = self._tokens, new_k.shape[2]
        out = self.cache.run(self._index, past, new, query, new_k, new_v, mask, scale, softcap, sinks)
        self._tokens += new
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens, resident or not, so that padding columns line up with positions."""
        return self._tokens + int(query_length), 0

    def get_seq_length(self) -> int:
        """Tokens taken so far."""
        return self._tokens

    def get_max_length(self) -> int:
        """No maximum of its own; the cache raises when its `max_tokens` are used up."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._tokens, self._new, self.is_initialized = 0, None, False
        self.cache.release()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beams change places; done once for all layers, when the first is asked."""
        if self._index == self.cache.first:
            self.cache.arena.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing can be taken back: ValueError, unless nothing is to be removed."""
        if tokens_to_remove:
            raise ValueError("an offloaded cache cannot take tokens back; generate without assisted or lookup decoding")


class TieredCache(Cache):
    """A cache for one batch: full-attention layers follow the policy, all others stay as Hugging Face has them."""

    def __init__(
        self, config: Any, shape: ModelShape, policy: Policy, device: torch.device, max_new_tokens: int, mover: Mover
    ) -> None:
        layers = DynamicCache(config=config).layers or [DynamicLayer() for _ in shape.layers]
        own = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        self.first = own[0] if own else -1
        super().__init__(layers=[TieredLayer(self, i) if i in own else layer for i, layer in enumerate(layers)])
        self.shape, self.policy, self.max_new_tokens = shape, policy, max_new_tokens
        self.device, self.mover = device, mover
        self.executor = Executor(device, mover)
        self.arena: Arena = Arena(device, 0)
        self._max_tokens = self._prompt_tokens = 0

    def allocate(self, layer: int, prompt_tokens: int, like: torch.Tensor) -> None:
        """Allocate a layer's buffers for this prompt and `max_new_tokens` more."""
        if self.arena.batch == 0:
            self.arena = Arena(like.device, like.shape[0])
            self._max_tokens = prompt_tokens + self.max_new_tokens
        last = Step.decoding(prompt_tokens, self.max_new_tokens)
        self.arena.allocate(layer, plan_layer(self.policy, self.shape, last, layer).buffers)

    def run(
        self,
        layer: int,
        past: int,
        new: int,
        query: torch.Tensor,
        new_k: torch.Tensor,
        new_v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Plan and execute one attention call.

        Raises ValueError when the cache was allocated for fewer tokens.
        """
        if past + new > self._max_tokens:
            raise ValueError(
                f"the cache holds {self._max_tokens} tokens (prompt and max_new_tokens={self.max_new_tokens}) and "
                f"token {past + new} has come; give offload(..., max_new_tokens=...) more"
            )
        plan = self.plan(layer, past, new)
        call = Call(
            shape=self.shape.layers[layer],
            step=self.step(past, new),
            state=self.arena.tensors(layer),
            q=query,
            new_k=new_k,
            new_v=new_v,
            mask=mask,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )
        self.executor.run(plan, method_of(plan.policy), call)
        assert call.out is not None  # noqa: S101 - the executor has checked it
        return call.out

    def step(self, past: int, new: int) -> Step:
        """The step that these tokens are: several at once are (more of) a prompt, one alone is decoded."""
        prompt = past + new if new > 1 or past == 0 else self._prompt_tokens
        self._prompt_tokens = prompt
        return Step(prompt_tokens=prompt, past_tokens=past, new_tokens=new)

    def plan(self, layer: int, past: int, new: int) -> LayerPlan:
        """The layer's plan for these tokens."""
        return plan_layer(self.policy, self.shape, self.step(past, new), layer)

    def release(self) -> None:
        """Give all memory back, host memory zeroed."""
        self.arena.release()
        self.arena = Arena(self.device, 0)
