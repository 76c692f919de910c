"""Decode steps of a cache that are captured once, as one CUDA graph for the whole model, and then replayed.

The first step of a kind runs as the graph will, kernel by kernel (what is compiled at first use is compiled then), the
second is captured, and from there on a step is one launch: the model's code does not run again. Kernels take the length
from device memory; plans are bound as ever, so that bytes and counts of a replayed step are those of an eager one. On a
CPU, where there are no graphs, every step runs as the first does.
"""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from policies import Step
from runtime.bound import Bound, BoundLayer
from runtime.capturable import refusal, refusal_so_late, says_as_before
from runtime.heard import WITH_IDS
from runtime.recorder import At
from runtime.walk import Walk, prepared

if TYPE_CHECKING:
    from runtime.cache import TieredCache

LOG = logging.getLogger(__name__)
KINDS = 4  # graphs that a cache keeps
# What a step may be given besides ids and a cache: it changes nothing, or is looked at here.
UNDERSTOOD = frozenset((*WITH_IDS - {"labels"}, "past_key_values", "use_cache", "return_dict"))

Forward = Callable[..., Any]


@dataclass(slots=True)
class Replays:
    """How the decode steps of all caches of one `offload` have run.

    `prepared` ran with kernels that know no length, `replayed` of them as a graph; `eager` did not, by reason.
    """

    prepared: int = 0
    replayed: int = 0
    eager: Counter[str] = field(default_factory=Counter)

    def refuse(self, why: str) -> None:
        """Count a step that was not replayed; the first of each reason is told."""
        if not self.eager[why]:
            LOG.warning("decode steps are not captured: %s", why)
        self.eager[why] += 1


class _Asked(NamedTuple):
    """A step as it is asked for: ids (batch, 1) and positions, of which the last dimension is 1."""

    ids: Tensor
    positions: Tensor | None


class _Settled(NamedTuple):
    """A step by layer, and what is bound for it."""

    steps: dict[int, Step]
    bounds: dict[int, Bound]


class _Graph(NamedTuple):
    """A captured step: `out` are the tensors of the model's output by name, `made` builds the output of them."""

    graph: "torch.cuda.CUDAGraph"
    walk: Walk
    out: dict[str, Tensor]
    made: type
    bounds: dict[int, Bound]


class Captured:
    """The captured steps of one cache."""

    def __init__(self, replays: Replays) -> None:
        self._replays = replays
        self._layers: dict[int, BoundLayer] = {}
        self._graphs: dict[Any, _Graph | None] = {}  # by kind; None: it has run once and is captured next
        self._pool: Any = None
        self._ids = self._positions = self._past = self._mask = torch.empty(0)
        self._real: Tensor | None = None  # what `_mask` says
        self._ahead: tuple[Any, _Settled] | None = None  # what the next step will be, if nothing comes between
        self._refused: str | None = None  # why nothing can be captured; None: not looked at

    def forget(self) -> None:
        """Drop all graphs, which refer to memory of an arena."""
        self._layers.clear()
        self._graphs.clear()
        self._ahead = None
        self._pool = self._real = self._refused = None
        self._ids = self._positions = self._past = self._mask = torch.empty(0)

    def forward(self, cache: "TieredCache", forward: Forward, given: dict[str, Any]) -> Any:
        """The model's forward: a replay where it decodes one token as before, else its own."""
        asked = self._asked(cache, forward, given)
        if asked is None:
            return forward(**given)
        if isinstance(asked, str):
            self._replays.refuse(asked)
            return forward(**given)
        with cache.at_work():
            steps, bounds = self._settled(cache)
            self._ahead = None
            self._fill(cache, asked)
            kind = (
                tuple(map(id, bounds.values())),
                cache.rotaries.addresses,
                cache.real_tokens is None,
                _shapes(asked),
            )
            known = self._graphs.get(kind)
            if known is None and kind in self._graphs and cache.device.type == "cuda":
                known = self._capture(cache, forward, kind, bounds)
            if known is None:
                out, walk = self._walked(cache, forward, bounds)
                self._remember(kind, None)
            else:
                out, walk = self._replay(cache, known), known.walk
            self._replays.prepared += 1
            self._note(cache, steps, bounds, walk)
            cache.advance()
            self._real = cache.real_tokens
            self._ahead = _when(cache), self._settled(cache)  # while the device is at work
        return out

    # -- what can be captured ------------------------------------------------------------------------------------

    def _asked(self, cache: "TieredCache", forward: Forward, named: dict[str, Any]) -> _Asked | str | None:
        """A step to replay; why not; or None for a forward that is no decode step of one token."""
        ids = named.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or not cache.own:
            return None
        layer = cache.tiered(cache.own[0])
        if not cache.arena.batch or layer.tokens < layer.prompt_tokens or ids.shape[0] != cache.arena.batch:
            return None
        if self._refused is None:
            self._refused = refusal(cache, forward)
        if self._refused:
            return self._refused
        if late := refusal_so_late(cache):
            return late
        if torch.is_grad_enabled():
            return "gradients are recorded; decode under torch.no_grad() or torch.inference_mode()"
        others = (name for name, value in named.items() if value is not None and value is not False)
        if other := next((name for name in others if name not in UNDERSTOOD), None):
            return f"the forward is given {other}"
        if named.get("return_dict") is False or named.get("use_cache") is False:
            return "the forward is asked for a tuple, or not to use its cache"
        if not says_as_before(named.get("attention_mask"), cache):
            return "the attention mask says something else of cached tokens than before, or more than what is padding"
        positions = named.get("position_ids")
        return _Asked(ids, positions if isinstance(positions, Tensor) else None)

    def _settled(self, cache: "TieredCache") -> _Settled:
        """Every layer's next step, and its plan for that, bound to kernels that know no length."""
        if self._ahead is not None and self._ahead[0] == _when(cache):
            return self._ahead[1]
        steps, bounds = {}, {}
        for index in cache.own:
            layer = cache.tiered(index)
            if index not in self._layers:
                plans = cache.terms.plans.of(layer.leaf, index)
                self._layers[index] = BoundLayer(plans, prepared(layer.method), index)
            # A later turn is more of the prompt for some layers of a cache, and not for others.
            steps[index] = Step(prompt_tokens=layer.prompt_tokens, past_tokens=layer.tokens, new_tokens=1)
            bounds[index] = self._layers[index].at(steps[index], cache.arena)
        return _Settled(steps, bounds)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _fill(self, cache: "TieredCache", asked: _Asked) -> None:
        """Put what a step is given where the graph reads it."""
        past, positions, real = cache.tokens, asked.positions, cache.real_tokens
        if (self._ids.shape, self._positions.shape) != _shapes(asked) or self._past.device != cache.device:
            self._allocate(cache, asked)
        self._past.fill_(past)
        self._ids.copy_(asked.ids)
        if positions is None:
            self._positions.fill_(past)
        else:
            self._positions.copy_(positions)
        if real is not None and real is not self._real:
            self._mask.fill_(value=True)
            self._mask[:, 0, 0, : real.shape[1]] = real

    def _allocate(self, cache: "TieredCache", asked: _Asked) -> None:
        """Memory for what steps are given; graphs that read other memory are of no use any more."""
        self._graphs.clear()
        if asked.positions is not None:
            cache.rotaries.widen(asked.positions.shape[-2])
        with torch.inference_mode(mode=False):
            self._past = torch.empty(1, dtype=torch.int64, device=cache.device)
            self._ids, self._positions = (
                torch.empty(shape, dtype=torch.int64, device=cache.device) for shape in _shapes(asked)
            )
            self._mask = torch.ones(len(asked.ids), 1, 1, cache.max_tokens, dtype=torch.bool, device=cache.device)

    def _walked(self, cache: "TieredCache", forward: Forward, bounds: dict[int, Bound]) -> tuple[Any, Walk]:
        """Run the model once with kernels that know no length."""
        walk = Walk(cache, bounds, self._past, None if cache.real_tokens is None else self._mask)
        with cache.walking(walk):
            out = forward(input_ids=self._ids, position_ids=self._positions, past_key_values=cache, use_cache=True)
        walk.finish()
        return out, walk

    def _capture(self, cache: "TieredCache", forward: Forward, kind: Any, bounds: dict[int, Bound]) -> _Graph | None:
        """The step as a graph; None, with nothing changed, where it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out, walk = self._walked(cache, forward, bounds)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            cache.forget_forward()
            self._graphs.clear()
            self._refused = f"capturing failed: {str(error).splitlines()[0]}"
            self._replays.refuse(self._refused)
            return None
        tensors = {name: value for name, value in out.items() if isinstance(value, Tensor)}
        known = _Graph(graph, walk, tensors, type(out), bounds)
        self._remember(kind, known)
        return known

    def _replay(self, cache: "TieredCache", known: _Graph) -> Any:
        cache.begin_replay(self._ids.shape[0])
        known.graph.replay()
        self._replays.replayed += 1
        return known.made(**{name: value.clone() for name, value in known.out.items()}, past_key_values=cache)

    def _remember(self, kind: Any, graph: _Graph | None) -> None:
        if kind not in self._graphs and len(self._graphs) == KINDS:
            self._graphs.pop(next(iter(self._graphs)))
        self._graphs[kind] = graph

    def _note(self, cache: "TieredCache", steps: dict[int, Step], bounds: dict[int, Bound], walk: Walk) -> None:
        drawn = walk.drawn()
        for index, bound in bounds.items():
            at = At(cache.first_sequence, cache.arena.batch, index, cache.tiered(index).first_prompt_tokens)
            cache.terms.recorder.note(at, steps[index], bound.counted.counts, drawn[index])


def _when(cache: "TieredCache") -> tuple[Any, ...]:
    """What a step follows from: equal where nothing has come between."""
    layers = (cache.tiered(index) for index in cache.own)
    return id(cache.arena), cache.arena.revision, *((layer.prompt_tokens, layer.tokens) for layer in layers)


def _shapes(asked: _Asked) -> tuple[torch.Size, torch.Size]:
    """Of the ids and of the positions that a graph reads."""
    return asked.ids.shape, torch.Size((1, 1)) if asked.positions is None else asked.positions.shape
