"""Carries out the steps of one cache: a layer is bound, run and recorded, and a prompt brought to its end."""

from typing import NamedTuple

import torch

from policies import Step, plan_ends
from runtime.arena import Arena
from runtime.bound import Bound, BoundLayer
from runtime.call import Call, Handed, Method
from runtime.executor import Executor
from runtime.layer import TieredLayer
from runtime.recorder import At
from runtime.rotaries import Rotaries
from runtime.terms import Terms, own_layers


class Held(NamedTuple):
    """What a cache holds for its sequences, of which the first has this number among all of its `offload`."""

    arena: Arena
    rotaries: Rotaries
    first_sequence: int


class Steps:
    """The steps of one cache, layer after layer."""

    def __init__(self, terms: Terms, device: torch.device) -> None:
        self.executor = Executor(device, terms.mover)
        self._terms, self._last = terms, own_layers(terms.seen)[-1:]
        self._bound: dict[int, BoundLayer] = {}  # by layer
        self._ended: dict[int, tuple[Method, Call]] = {}  # the last call of a prompt, for whole-model work

    def run(self, layer: TieredLayer, step: Step, handed: Handed, held: Held) -> torch.Tensor:
        """One step of one layer; its output, (batch, heads, new_tokens, head_dim)."""
        bound = self._bound_of(layer).at(step, held.arena)
        call = self._call(layer, bound, step, handed, held)
        self.executor.run(bound, call)
        at = At(held.first_sequence, held.arena.batch, layer.index, layer.first_prompt_tokens)
        self._terms.recorder.note(at, step, bound.counted.counts, call.counts)
        if step.last_chunk:
            self._end_prompt(layer, step, call, held.arena)
        assert call.out is not None  # noqa: S101 - the executor has checked it
        return call.out

    def ahead(self, layer: TieredLayer, step: Step, handed: Handed, held: Held) -> None:
        """Let the copies of a layer begin that wait for nothing of its own; `handed` is what the one before was."""
        bound = self._bound_of(layer).at(step, held.arena)
        if bound.leading:
            nothing = Handed(handed.q[:, :, :0], handed.new_k[:, :, :0], handed.new_v[:, :, :0], None, handed.scale)
            self.executor.run_ahead(bound, self._call(layer, bound, step, nothing, held))

    def forget(self, layer: int | None = None) -> None:
        """Drop what is bound, which refers to tensors of an arena: of one layer, or of all and of a prompt's end."""
        if layer is not None:
            self._bound.pop(layer, None)
            return
        self._bound.clear()
        self._ended.clear()

    def _bound_of(self, layer: TieredLayer) -> BoundLayer:
        if layer.index not in self._bound:
            plans = self._terms.plans.of(layer.leaf, layer.index)
            self._bound[layer.index] = BoundLayer(plans, layer.method, layer.index)
        return self._bound[layer.index]

    def _call(self, layer: TieredLayer, bound: Bound, step: Step, handed: Handed, held: Held) -> Call:
        return Call(
            shape=self._terms.shape.layers[layer.index],
            step=step,
            state=bound.state,
            rotary=held.rotaries.of.get(layer.index),
            **handed._asdict(),
        )

    def _end_prompt(self, layer: TieredLayer, step: Step, call: Call, arena: Arena) -> None:
        """The prompt is complete on this layer: after the last one comes whole-model work, and what passes is freed."""
        if layer.method.ends:
            self._ended[layer.index] = (layer.method, call)
        if layer.index not in self._last:
            return
        for end in plan_ends(self._terms.policy, self._terms.shape, step):
            method, _ = self._ended[end.layers[0]]
            self.executor.run_end(end.ops, method, [self._ended[i][1] for i in end.layers])
        self._ended.clear()
        self.executor.join()
        arena.release_passing()
