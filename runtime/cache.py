"""The Hugging Face cache whose layers keep their tokens where a policy's plan says."""

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer

from policies import Full, Step
from policies.plan import Buffer
from runtime.arena import DTYPES, Arena
from runtime.call import Handed, Method
from runtime.captured import Captured
from runtime.forward import Forward
from runtime.heard import Heard
from runtime.hybrid import TieredHybridLayer
from runtime.layer import TieredLayer
from runtime.masks import Seen, read_mask
from runtime.memory import check_fits
from runtime.rotaries import Rotaries
from runtime.steps import Held, Steps
from runtime.terms import LONG_PROMPT, Terms, own_layers
from runtime.walk import Walk

LOG = logging.getLogger(__name__)


class TieredCache(Cache):
    """A cache for one batch: full-attention layers follow the policy, all others stay as Hugging Face has them."""

    def __init__(self, config: Any, terms: Terms, device: torch.device, prompt_tokens: int | None) -> None:
        self.terms, self.device, self.prompt_tokens = terms, device, prompt_tokens
        layers = DynamicCache(config=config).layers or [DynamicLayer() for _ in terms.seen]
        self.own = own_layers(terms.seen)
        super().__init__(layers=[self._own(i, x) if i in self.own else x for i, x in enumerate(layers)])
        self.steps = Steps(terms, device)
        self.arena: Arena = Arena(device, 0, terms.footprint)
        self.max_tokens = 0
        self.progress: Callable[[Step], None] | None = None  # told each step that a layer has done
        self.rotaries = Rotaries(terms.seen)
        self.first_sequence = 0  # its number among all sequences of its `offload`
        self.captured = None if terms.replays is None else Captured(terms.replays)
        self.walk: Walk | None = None  # the captured step under way
        self._real: torch.Tensor | None = None  # which tokens are no padding, bool (batch, tokens); None: all
        self._read: tuple[torch.Tensor | None, Seen] | None = None  # the mask of this forward, and what it says
        self._switch_tokens = _switch_tokens(config)
        self.beyond: bool | None = None  # whether cached tokens were rotated for contexts beyond those
        self._forward = Forward()
        self._lock = threading.RLock()
        self.heard = Heard()
        self._register(self)

    def _own(self, index: int, stock: Any) -> TieredLayer:
        leaf = self.terms.leaf(LONG_PROMPT, index)
        if isinstance(stock, LinearAttentionAndFullAttentionLayer):
            return TieredHybridLayer(self, index, *leaf, number_of_states=stock.number_of_states)
        return TieredLayer(self, index, *leaf)

    # -- use -----------------------------------------------------------------------------------------------------

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Our own arithmetic: without gradients, inference tensors and autocast, and never while the cache ends."""
        device = self.device.type
        with (
            self._lock,
            torch.inference_mode(mode=False),
            torch.no_grad(),
            torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext(),
        ):
            yield

    @property
    def tokens(self) -> int:
        """Tokens that the cache has taken; 0 for a model whose layers are all its own."""
        return self.tiered(self.own[0]).tokens if self.own else 0

    def tiered(self, index: int) -> TieredLayer:
        """One of the layers that follow the policy; ValueError for another."""
        layer = self.layers[index]
        if not isinstance(layer, TieredLayer):
            raise ValueError(f"layer {index}, a {type(layer).__name__} of Transformers, follows no policy")
        return layer

    @property
    def ids(self) -> torch.Tensor | None:
        """The token ids that the cache holds, (batch, tokens), or None where some came as embeddings."""
        return self.heard.ids(self.tokens)

    @property
    def real(self) -> torch.Tensor:
        """Which tokens are no padding: bool (batch, tokens)."""
        if self._real is not None:
            return self._real
        return torch.ones(self.arena.batch, self.tokens, dtype=torch.bool, device=self.device)

    @real.setter
    def real(self, real: torch.Tensor) -> None:
        self._real = None if real.all() else real

    def begin(self, decoder: torch.nn.Module, batch: int, new: int, positions: torch.Tensor | None) -> None:
        """A forward of the decoder begins, with `new` tokens for each of `batch` sequences, at given positions or next.

        Raises ValueError when it cannot go well.
        """
        self.check_usable()
        if decoder is not self.terms.decoder():
            raise ValueError(
                f"this cache was made for another model ({self.terms.shape.name}); use the one that offload() was given"
            )
        if not new:
            raise ValueError(f"no token is new: the cache has {self.tokens} already; give at least one more")
        self._check_batch(batch)
        if self.own and self.arena.batch:
            self._check_room(self.tiered(self.own[0]), new)
        self._check_switch(new, positions)
        self._forward.begin(self.own)
        self._read = None

    def _check_switch(self, new: int, positions: torch.Tensor | None) -> None:
        """Raise ValueError where LongRoPE turns to other angles than those of what is cached."""
        if self._switch_tokens is None:
            return
        last = self.tokens + new if positions is None else int(positions.max()) + 1
        beyond = last > self._switch_tokens
        if self.tokens and beyond != (self.tokens > self._switch_tokens if self.beyond is None else self.beyond):
            raise ValueError(
                f"the cached tokens were rotated for contexts of {'more than' if not beyond else 'at most'} "
                f"{self._switch_tokens} tokens and the new ones would be for others (LongRoPE has two sets of "
                "factors); begin with a prompt beyond that length, or stop before it"
            )
        self.beyond = beyond

    def finish(self) -> None:
        """The decoder has come to the end of a forward.

        Raises ValueError when a layer has not attended as the policy says, so that its output is worth nothing.
        """
        self._forward.finish()
        if self.walk is not None:
            return
        if self._read is not None:
            self._real, self._read = self._read[1].real, None
        else:
            self._real = None

    # -- captured steps ------------------------------------------------------------------------------------------

    @property
    def real_tokens(self) -> torch.Tensor | None:
        """Which tokens are no padding, bool (batch, tokens), or None where none is."""
        return self._real

    @property
    def switches(self) -> bool:
        """Whether the model turns to other rotary angles at some length."""
        return self._switch_tokens is not None

    @contextmanager
    def walking(self, walk: Walk) -> Iterator[None]:
        """While it lasts, attention calls go to `walk`, and no layer counts its token."""
        self.walk = walk
        try:
            yield
        finally:
            self.walk = None

    def begin_replay(self, batch: int) -> None:
        """A captured step is about to be replayed, with one new token for each of `batch` sequences.

        Raises what `begin` raises.
        """
        decoder = self.terms.decoder()
        if decoder is not None:
            self.begin(decoder, batch, 1, None)

    def forget_forward(self) -> None:
        """The forward under way was broken off while it was captured, so that nothing of it has happened."""
        self.rotaries.end_step()
        self._forward.forget()

    def advance(self) -> None:
        """A captured step has run: every layer has one more token, which is real."""
        for index in self.own:
            self.tiered(index).tokens += 1
        self.rotaries.advance()
        self.rotaries.end_step()
        if self._real is not None:
            self._real = torch.nn.functional.pad(self._real, (0, 1), value=True)
        self._forward.forget()

    # ------------------------------------------------------------------------------------------------------------

    def _register(self, cache: "TieredCache") -> None:
        known = self.terms.caches
        known[:] = [*(reference for reference in known if reference() is not None), weakref.ref(cache)]

    def check_usable(self) -> None:
        """Raise ValueError when the cache has ended, or was left in the middle of a forward."""
        self._forward.check_usable()

    def expect(self, layer: TieredLayer, keys: torch.Tensor) -> None:
        """Check that these new keys of a layer come when and as they must.

        Raises ValueError when they do not.
        """
        self._forward.expect(layer.index)
        self._check_batch(keys.shape[0])

    def stored(self, part: torch.Tensor) -> torch.Tensor:
        """New queries, keys or values in the dtype that the cache stores, exactly.

        Raises ValueError when that is too narrow for them.
        """
        dtype = DTYPES[self.terms.shape.kv_dtype]
        if part.dtype != dtype and torch.promote_types(part.dtype, dtype) != dtype:
            raise ValueError(
                f"attention computes in {part.dtype} and the cache stores {dtype}, as the model was loaded; leave out "
                "torch.autocast, or load the model in the dtype that it computes in"
            )
        return part.to(dtype)

    def _check_batch(self, batch: int) -> None:
        if self.arena.batch not in (0, batch):
            raise ValueError(
                f"the cache has {self.arena.batch} sequences and {batch} have come; use a new kv.cache(), or "
                "batch_repeat_interleave and batch_select_indices"
            )

    def end(self, why: str) -> None:
        """Give all memory back for good; whoever uses the cache afterwards is told `why`."""
        with self._lock:
            self._forward.end(why)
            self.release()

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
        for layer in (self.tiered(index) for index in self.own):
            layer.dtype, layer.device, layer.is_initialized = DTYPES[self.terms.shape.kv_dtype], self.device, True
            self._settle(layer, prompt, prompt)

    def settled(self, prompt: int) -> dict[int, tuple[Method, list[Buffer]]]:
        """What each layer under the policy keeps after a first prompt of so many tokens, and the torch code for it."""
        leaves = {index: self.terms.leaf(prompt, index) for index in self.own}
        return {i: (method, self.terms.buffers(leaf, i, prompt, prompt)[0]) for i, (leaf, method) in leaves.items()}

    def _admit(self, batch: int, prompt: int, first: int, device: torch.device) -> None:
        self._check_positions(prompt)
        check_fits(self.terms.needed_bytes(batch, prompt, first), device)
        self.arena = Arena(device, batch, self.terms.footprint)
        self.max_tokens = prompt + self.terms.max_new_tokens
        self.first_sequence = self.terms.recorder.admit(batch)

    def _settle(self, layer: TieredLayer, prompt: int, first: int) -> list[Buffer]:
        """Decide a layer's policy by its first prompt, and allocate what it keeps; what only the prompt needs."""
        layer.prompt_tokens = layer.first_prompt_tokens = prompt
        layer.leaf, layer.method = self.terms.leaf(prompt, layer.index)
        self.steps.forget(layer.index)
        if layer.index == self.own[0]:
            self._say_if_dense(layer, prompt)
        if layer.method.unrotates:
            self.rotaries.add_unrotated(layer.index, self.max_tokens)
        kept, passing = self.terms.buffers(layer.leaf, layer.index, prompt, first)
        self.arena.allocate(layer.index, kept)
        return passing

    def release(self) -> None:
        """Give all memory back, host memory zeroed."""
        with self.at_work():
            self.steps.executor.settle()
            self.arena.release()
        self.arena = Arena(self.device, 0, self.terms.footprint)
        self.rotaries.clear()
        self.steps.forget()
        self._drop_graphs()
        self._forward.forget()
        self._real = self._read = None

    def _drop_graphs(self) -> None:
        if self.captured is not None:
            self.captured.forget()

    def reorder(self, rows: torch.Tensor) -> None:
        """Sequence i takes the state of sequence `rows[i]`."""
        self.check_usable()
        with self.at_work():
            self.steps.executor.settle()
            self.arena.reorder(rows)
            self._take_rest(rows)

    def take(self, rows: torch.Tensor) -> None:
        """The cache becomes one of `len(rows)` new sequences: sequence i begins with the state of sequence `rows[i]`.

        Raises MemoryError, with nothing changed, when they do not fit beside those that they come from.
        """
        self.check_usable()
        if not self.arena.batch:
            return
        if not len(rows):
            raise ValueError("no sequence is left of the batch; select at least one")
        with self.at_work():
            before = self.arena
            self.arena = self._taken(before, rows)
            self.steps.forget()
            self._drop_graphs()
            before.release()
            self._take_rest(rows)
        self.first_sequence = self.terms.recorder.admit(len(rows))

    def __deepcopy__(self, memo: dict[int, Any]) -> "TieredCache":
        """A cache of its own: new sequences, which begin with the state that this one has now.

        Raises ValueError when the cache has ended or was interrupted, MemoryError when the copy does not fit.
        """
        self.check_usable()
        copy = TieredCache.__new__(TieredCache)
        with self.at_work():
            vars(copy).update(vars(self))
            vars(copy).update(
                layers=[x.of(copy) if isinstance(x, TieredLayer) else deepcopy(x, memo) for x in self.layers],
                steps=Steps(self.terms, self.device),
                arena=self._taken(self.arena, torch.arange(self.arena.batch)),
                rotaries=self.rotaries.copy(),
                heard=self.heard.copy(),
                progress=None,
                captured=None if self.terms.replays is None else Captured(self.terms.replays),
                walk=None,
                _forward=Forward(),
                _lock=threading.RLock(),
                first_sequence=self.terms.recorder.admit(self.arena.batch),
            )
        self._register(copy)
        return copy

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, one after the other; they are new sequences.

        Raises ValueError, with nothing changed, where a layer of Hugging Face's own cannot.
        """
        self._check_layers_can("batch_repeat_interleave")
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences, given by numbers or as bool; they are new sequences.

        Raises ValueError, with nothing changed, where a layer of Hugging Face's own cannot.
        """
        self._check_layers_can("batch_select_indices")
        super().batch_select_indices(indices)

    def _check_layers_can(self, what: str) -> None:
        for index, layer in enumerate(self.layers):
            if not hasattr(layer, what):
                raise ValueError(f"layer {index}, a {type(layer).__name__} of Transformers, knows no {what}")

    def _taken(self, arena: Arena, rows: torch.Tensor) -> Arena:
        self.steps.executor.settle()
        needed = {tier: nbytes // max(1, arena.batch) * len(rows) for tier, nbytes in arena.allocated_bytes.items()}
        check_fits(needed, arena.device)
        return arena.taken(rows)

    def _take_rest(self, rows: torch.Tensor) -> None:
        """What a cache knows of its sequences besides the arena."""
        self.heard.take(rows)
        self.rotaries.take(rows)
        if self._real is not None:
            self._real = self._real[rows.to(self._real.device)]

    def _check_positions(self, tokens: int) -> None:
        most = self.terms.shape.max_positions
        if tokens > most:
            raise ValueError(f"{tokens} tokens exceed the {most} positions of {self.terms.shape.name}; cut the prompt")

    def _say_if_dense(self, layer: TieredLayer, prompt: int) -> None:
        meant, _ = self.terms.leaf(LONG_PROMPT, layer.index)
        if layer.leaf == Full() and meant != Full():
            least = meant.minimum_prompt_tokens(self.terms.shape, layer.index)
            LOG.warning("%s leaves a prompt of %d tokens dense: it begins at %d", self.terms.policy.name, prompt, least)

    # -- steps ---------------------------------------------------------------------------------------------------

    def angles(self, index: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """What the model rotates the new tokens of a layer by; layers that share a table hand over the same tensor."""
        layer = self.layers[index]
        if not isinstance(layer, TieredLayer) or not layer.method.unrotates:
            return
        capacity_tokens = (self.prompt_tokens or cos.shape[1]) + self.terms.max_new_tokens
        with self.at_work():
            self.rotaries.hear(index, cos, sin, capacity_tokens, None if self.walk is None else self.walk.row)

    def run(self, layer: TieredLayer, handed: Handed) -> torch.Tensor:
        """Plan and execute one attention call.

        Raises ValueError when the cache was allocated for fewer tokens, the model has fewer positions, or the policy
        cannot honour the mask.
        """
        if self.walk is not None:
            self._forward.attends()
            return self.walk.run(layer, handed)
        past, new, prompt = layer.tokens, handed.new_k.shape[2], layer.prompt_tokens
        self._check_room(layer, new)
        handed = handed._replace(mask=self._mask(layer, handed))
        self._forward.attends()
        if layer.index == self.own[0]:
            self.steps.executor.begin()
        if past >= prompt and new > 1 and layer.method.extends:
            layer.prompt_tokens = prompt = past + new
        at_once = (layer.method.execution_tokens or new) if past < prompt else 1
        outs, held = [], Held(self.arena, self.rotaries, self.first_sequence)
        for first in range(0, new, at_once):
            if new > at_once:  # each is a step of its own
                self.steps.executor.begin()
            step = Step(prompt_tokens=prompt, past_tokens=past + first, new_tokens=min(at_once, new - first))
            outs.append(self.steps.run(layer, step, handed.span(first, step.new_tokens, step.tokens), held))
            if self.progress:
                self.progress(step)
        if layer.index == self.own[-1]:
            self.rotaries.end_step()
        if new == 1 and not step.prefilling:
            after = self.layers[layer.index + 1] if layer.index + 1 < len(self.layers) else None
            if isinstance(after, TieredLayer) and after.is_initialized and after.tokens == step.past_tokens:
                self.steps.ahead(after, step, handed, held)
        return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]

    def _mask(self, layer: TieredLayer, handed: Handed) -> torch.Tensor | None:
        """The mask as the layer's method takes it; layers that share a mask read it once."""
        if self._read is None or self._read[0] is not handed.mask:
            batch, _, new, _ = handed.q.shape
            seen = read_mask(
                handed.mask,
                past=layer.tokens,
                new=new,
                batch=batch,
                before=self._real,
                prompt=layer.first_prompt_tokens,
            )
            self._read = (handed.mask, seen)
        return self._read[1].to(layer.method, layer.leaf.name)

    def _check_room(self, layer: TieredLayer, new: int) -> None:
        past, prompt = layer.tokens, layer.prompt_tokens
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

    def cropped(self, layer: TieredLayer, gone: int) -> None:
        """A layer has taken back tokens."""
        self.rotaries.drop(layer.index, gone, layer.tokens)
        if self._real is not None:
            self._real = self._real[:, : layer.tokens]


def _switch_tokens(config: Any) -> int | None:
    """The context from which on LongRoPE rotates by its long factors; None for a model without them."""
    rope = getattr(config, "rope_parameters", None) or {}
    tables = [rope, *(table for table in rope.values() if isinstance(table, dict))]  # one for all layers, or by type
    long = (table for table in tables if table.get("rope_type") == "longrope")
    return next((table.get("original_max_position_embeddings") for table in long), None)
