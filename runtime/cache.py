"""The Hugging Face cache whose layers keep their tokens where a policy's plan says."""

import logging
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from policies import Full, LayerPlan, ModelShape, Policy, Step, plan_ends, plan_layer, settle
from policies.plan import Buffer, Tier, stored_bytes
from runtime.arena import DTYPES, Arena
from runtime.call import Call, Handed, Method
from runtime.executor import Executor
from runtime.memory import check_fits
from runtime.methods import method_of
from runtime.mover import Mover
from runtime.probe import SeenLayer
from runtime.recorder import At, Recorder
from runtime.rotary import UNROTATED, Rotary

LOG = logging.getLogger(__name__)
HANDLE = "_kvsim_layer"  # attribute of the keys that `update` returns: a weak reference to their layer
LONG_PROMPT = 1 << 16  # tokens: no policy leaves such a prompt dense for being short


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all caches of one `offload` share."""

    shape: ModelShape
    seen: tuple[SeenLayer, ...]
    policy: Policy
    max_new_tokens: int
    mover: Mover
    recorder: Recorder


class TieredLayer(CacheLayerMixin):
    """One layer: `update` takes the new tokens, and the attention function then runs the plan over them."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: "TieredCache", index: int) -> None:
        super().__init__()
        self._cache, self.index = weakref.ref(cache), index
        self.tokens = self.prompt_tokens = 0
        self.first_prompt_tokens = 0  # of the first turn, which has settled the policy
        self.leaf, self.method = _leaf(cache.terms, LONG_PROMPT, index)
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be taken back, as assisted and lookup decoding do."""
        return self.method.crops

    @property
    def cache(self) -> "TieredCache":
        """The cache that the layer belongs to."""
        cache = self._cache()
        if cache is None:
            raise RuntimeError("the cache of this layer no longer exists; keep `kv.cache()` while generating")
        return cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the layer's buffers for the whole generation."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.cache.open(self, key_states)
        self.is_initialized = True

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
        out = self.cache.run(self, Handed(query, new_k, new_v, mask, scale, softcap, sinks))
        self.tokens += new_k.shape[2]
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All tokens, resident or not, so that padding columns line up with positions."""
        return self.tokens + int(query_length), 0

    def get_seq_length(self) -> int:
        """Tokens taken so far."""
        return self.tokens

    def get_max_length(self) -> int:
        """No maximum of its own; the cache raises when its `max_tokens` are used up."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.tokens, self._new, self.is_initialized = 0, None, False
        self.cache.release()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beams change places; done once for all layers, when the first is asked."""
        if self.index == self.cache.own[0]:
            self.cache.reorder(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens: -n of them, or, as older versions of Transformers ask, all but n.

        Raises ValueError where the policy cannot.
        """
        gone = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.tokens - tokens_to_remove)
        if not gone:
            return
        if not self.method.crops:
            raise ValueError(
                f"a cache under {self.leaf.name} cannot take tokens back; generate without assisted or lookup decoding"
            )
        self.tokens -= gone
        self.prompt_tokens = min(self.prompt_tokens, self.tokens)
        self.cache.cropped(self, gone)


class TieredCache(Cache):
    """A cache for one batch: full-attention layers follow the policy, all others stay as Hugging Face has them."""

    def __init__(self, config: Any, terms: Terms, device: torch.device, prompt_tokens: int | None) -> None:
        self.terms, self.device, self.prompt_tokens = terms, device, prompt_tokens
        layers = DynamicCache(config=config).layers or [DynamicLayer() for _ in terms.seen]
        self.own = [i for i, seen in enumerate(terms.seen) if seen.kind == "full" and not seen.shared]
        super().__init__(layers=[TieredLayer(self, i) if i in self.own else x for i, x in enumerate(layers)])
        self.executor = Executor(device, terms.mover)
        self.arena: Arena = Arena(device, 0)
        self.max_tokens = 0
        self.progress: Callable[[Step], None] | None = None  # told each step that a layer has done
        self.rotaries: dict[int, Rotary] = {}  # by layer; layers that share angles share one
        self._extended: list[tuple[torch.Tensor, Rotary]] = []  # in this step
        self._last_calls: dict[int, Call] = {}  # of the prompt, for whole-model work
        self._first_sequence = 0

    # -- memory --------------------------------------------------------------------------------------------------

    def open(self, layer: TieredLayer, keys: torch.Tensor) -> None:
        """Allocate a layer's buffers for its prompt and `max_new_tokens` more.

        Raises ValueError when the prompt exceeds the model's positions, MemoryError when the cache does not fit.
        """
        batch, tokens = keys.shape[0], keys.shape[2]
        prompt = self.prompt_tokens or tokens
        if self.arena.batch == 0:
            self._admit(batch, prompt, tokens, keys.device)
        self.arena.allocate(layer.index, self._settle(layer, prompt, tokens), passing=True)

    def reopen(self, batch: int, prompt: int) -> None:
        """Allocate every layer as after a first prompt of so many tokens, for a state that is to be put there.

        Raises what `open` raises.
        """
        self.prompt_tokens = prompt
        self._admit(batch, prompt, prompt, self.device)
        for layer in (self.layers[index] for index in self.own):
            layer.dtype, layer.device, layer.is_initialized = DTYPES[self.terms.shape.kv_dtype], self.device, True
            self._settle(layer, prompt, prompt)

    def _admit(self, batch: int, prompt: int, first: int, device: torch.device) -> None:
        self._check_positions(prompt)
        check_fits(self._needed_bytes(batch, prompt, first), device)
        self.arena = Arena(device, batch)
        self.max_tokens = prompt + self.terms.max_new_tokens
        self._first_sequence = self.terms.recorder.admit(batch)

    def _settle(self, layer: TieredLayer, prompt: int, first: int) -> list[Buffer]:
        """Decide a layer's policy by its first prompt, and allocate what it keeps; what only the prompt needs."""
        layer.prompt_tokens = layer.first_prompt_tokens = prompt
        layer.leaf, layer.method = _leaf(self.terms, prompt, layer.index)
        if layer.index == self.own[0]:
            self._say_if_dense(layer, prompt)
        if layer.method.unrotates and self.terms.seen[layer.index].rotation == UNROTATED:
            self.rotaries[layer.index] = self.new_rotary(layer.index, self.max_tokens)
        kept, passing = self._buffers(layer.leaf, layer.index, prompt, first)
        self.arena.allocate(layer.index, kept)
        return passing

    def release(self) -> None:
        """Give all memory back, host memory zeroed."""
        self.executor.join()
        self.arena.release()
        self.arena = Arena(self.device, 0)
        for table in (self.rotaries, self._extended, self._last_calls):
            table.clear()

    def reorder(self, rows: torch.Tensor) -> None:
        """Sequence i takes the state of sequence `rows[i]`."""
        self.executor.join()
        self.arena.reorder(rows)

    def _buffers(self, leaf: Policy, layer: int, prompt: int, first: int) -> tuple[list[Buffer], list[Buffer]]:
        """What a layer keeps, at its largest, and what only its prompt needs; `first` tokens come in the first call."""
        shape, last = self.terms.shape, Step.decoding(prompt, self.terms.max_new_tokens)
        at_once = method_of(leaf).execution_tokens or prompt
        done = 0 if first == prompt <= at_once else prompt - 1
        whole = Step(prompt_tokens=prompt, past_tokens=done, new_tokens=prompt - done)
        kept = plan_layer(leaf, shape, last, layer).buffers
        names = {buffer.name for buffer in kept}
        passing = [b for b in plan_layer(leaf, shape, whole, layer).buffers if b.name not in names or b.ring]
        return list(kept), passing

    def _needed_bytes(self, batch: int, prompt: int, first: int) -> Counter[Tier]:
        layers = []
        for index in self.own:
            kept, passing = self._buffers(_leaf(self.terms, prompt, index)[0], index, prompt, first)
            layers.append(kept + passing)
        return Counter({tier: batch * nbytes for tier, nbytes in stored_bytes(layers).items()})

    def _check_positions(self, tokens: int) -> None:
        most = self.terms.shape.max_positions
        if tokens > most:
            raise ValueError(f"{tokens} tokens exceed the {most} positions of {self.terms.shape.name}; cut the prompt")

    def _say_if_dense(self, layer: TieredLayer, prompt: int) -> None:
        meant, _ = _leaf(self.terms, LONG_PROMPT, layer.index)
        if layer.leaf == Full() and meant != Full():
            least = meant.minimum_prompt_tokens(self.terms.shape, layer.index)
            LOG.warning("%s leaves a prompt of %d tokens dense: it begins at %d", self.terms.policy.name, prompt, least)

    # -- steps ---------------------------------------------------------------------------------------------------

    def angles(self, index: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """What the model rotates the new tokens of a layer by; layers that share a table hand over the same tensor."""
        layer = self.layers[index]
        if not isinstance(layer, TieredLayer) or not layer.method.unrotates:
            return
        rotation = self.terms.seen[index].rotation
        if rotation == UNROTATED:
            return
        for known, rotary in self._extended:
            if known is cos and rotary.rotation == rotation:
                self.rotaries[index] = rotary
                return
        if index not in self.rotaries:
            prompt = self.prompt_tokens or cos.shape[1]
            self.rotaries[index] = self.new_rotary(index, prompt + self.terms.max_new_tokens)
        self.rotaries[index].extend(cos, sin)
        self._extended.append((cos, self.rotaries[index]))

    def run(self, layer: TieredLayer, handed: Handed) -> torch.Tensor:
        """Plan and execute one attention call.

        Raises ValueError when the cache was allocated for fewer tokens, or the model has fewer positions.
        """
        past, new, prompt = layer.tokens, handed.new_k.shape[2], layer.prompt_tokens
        if past < prompt < past + new:
            raise ValueError(
                f"the prompt was announced with {prompt} tokens and its token {past + new} has come; give "
                "kv.cache(prompt_tokens=...) its whole length"
            )
        if past + new > self.max_tokens:
            raise ValueError(
                f"the cache holds {self.max_tokens} tokens (prompt and max_new_tokens={self.terms.max_new_tokens}) and "
                f"token {past + new} has come; give offload(..., max_new_tokens=...) more, or, for a prompt that comes "
                "in chunks, kv.cache(prompt_tokens=...)"
            )
        if layer.index == self.own[0]:
            self._check_positions(past + new)
            self.executor.begin()
        if past >= prompt and new > 1 and layer.method.extends:
            layer.prompt_tokens = prompt = past + new
        at_once = (layer.method.execution_tokens or new) if past < prompt else 1
        outs = []
        for first in range(0, new, at_once):
            if new > at_once:  # each is a step of its own
                self.executor.begin()
            step = Step(prompt_tokens=prompt, past_tokens=past + first, new_tokens=min(at_once, new - first))
            outs.append(self._step(layer, step, handed.span(first, step.new_tokens, step.tokens)))
        if layer.index == self.own[-1]:
            self._extended.clear()
        if new == 1 and not step.prefilling:
            self._ahead(layer, step, handed)
        return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]

    def _step(self, layer: TieredLayer, step: Step, handed: Handed) -> torch.Tensor:
        plan = plan_layer(layer.leaf, self.terms.shape, step, layer.index)
        if step.prefilling:  # a ring may have to grow with the chunk
            self.arena.allocate(layer.index, [b for b in plan.buffers if b.ring])
        call = self._call(layer, plan, step, handed)
        self.executor.run(plan, layer.method, call)
        self.terms.recorder.note(
            At(self._first_sequence, self.arena.batch, layer.index, layer.first_prompt_tokens), step, plan, call.counts
        )
        if step.last_chunk:
            self._finish(layer, step, call)
        if self.progress:
            self.progress(step)
        assert call.out is not None  # noqa: S101 - the executor has checked it
        return call.out

    def _call(self, layer: TieredLayer, plan: LayerPlan, step: Step, handed: Handed) -> Call:
        return Call(
            shape=self.terms.shape.layers[layer.index],
            step=step,
            state=self.arena.tensors(layer.index, plan.buffers),
            rotary=self.rotaries.get(layer.index),
            **handed._asdict(),
        )

    def _ahead(self, layer: TieredLayer, step: Step, handed: Handed) -> None:
        """Let the next layer's copies begin that wait for nothing of its own."""
        after = self.layers[layer.index + 1] if layer.index + 1 < len(self.layers) else None
        if isinstance(after, TieredLayer) and after.is_initialized and after.tokens == step.past_tokens:
            plan = plan_layer(after.leaf, self.terms.shape, step, after.index)
            nothing = Handed(handed.q[:, :, :0], handed.new_k[:, :, :0], handed.new_v[:, :, :0], None, handed.scale)
            self.executor.run_ahead(plan, after.method, self._call(after, plan, step, nothing))

    def _finish(self, layer: TieredLayer, step: Step, call: Call) -> None:
        """The prompt is complete on this layer: after the last one comes whole-model work, and what passes is freed."""
        if layer.method.ends:
            self._last_calls[layer.index] = call
        if layer.index != self.own[-1]:
            return
        for end in plan_ends(self.terms.policy, self.terms.shape, step):
            method = self.layers[end.layers[0]].method
            self.executor.run_end(end.ops, method, [self._last_calls[i] for i in end.layers])
        self._last_calls.clear()
        self.executor.join()
        self.arena.release_passing()

    def new_rotary(self, index: int, capacity_tokens: int) -> Rotary:
        """An empty table of angles as the model hands them to a layer."""
        rotation = self.terms.seen[index].rotation
        if rotation is None:
            raise RuntimeError(f"how layer {index} rotates keys is not known")  # which `offload` has refused
        return Rotary(capacity_tokens, rotation)

    def cropped(self, layer: TieredLayer, gone: int) -> None:
        """A layer has taken back tokens; angles that layers share go once."""
        rotary = self.rotaries.get(layer.index)
        if rotary is not None and rotary.tokens > layer.tokens:
            rotary.drop(gone)


def _leaf(terms: Terms, prompt: int, layer: int) -> tuple[Policy, Method]:
    """The policy of a layer for a first prompt, and its torch code."""
    leaf = settle(terms.policy, terms.shape, prompt, layer)
    return leaf, method_of(leaf)
