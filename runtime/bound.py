"""A layer's plan bound to its kernels, lanes and tensors: a decode step refreshes its counts and nothing else.

What two very different users take from it:

- The *eager executor* walks `ops` at every step and compares the bytes that a route has moved with `counted`.
- A *captured step*, one CUDA graph for all layers, walks `ops` once, while it captures, and then replays. It finds here
  what a graph needs and nothing that ties it to one length. A `Bound` is the same object for as long as a graph of it
  is valid, so its identity is the graph's key; an InfLLM layer goes back and forth between two. The tensors are the
  arena's, allocated at their largest, so addresses stay; no `BoundOp` has a token count. Lengths are for its kernels to
  read from device memory, an int64 for each sequence, which the host increases before a replay; a ring comes as a view
  in this step's shape, so a graph takes the storage below it whole. `BoundLayer.at` stays outside of the graph: it is
  arithmetic of the host and waits for no device, and the bytes that it states hold for a replayed step as they do for
  an eager one. What cannot be captured is seen beforehand: an operation on the lane `HOST` runs on the CPU, or waits
  for it, and splits the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from policies import LayerPlan, Step
from policies.plan import Copy, Engine, Processor, Sync, Tier
from runtime.arena import Arena
from runtime.call import Kernel, Method, Route
from runtime.derived import PIECES, Counted, Derived, LayerPlans, counted

MODEL_LANE = ""  # the stream that the model runs on
HOST = "host"  # no stream: the host waits for what comes before, then works


class BoundCopy(NamedTuple):
    """A copy's route and ends; `number` counts the copies of a plan, as `Counted.copies` does."""

    number: int
    route: Route
    src: Tier
    dst: Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundOp:
    """What stays of an operation: how it is run, where, and after what.

    `awaits` are operations by name, so many layers back. Without `kernel` and `copy` there is nothing to run: another
    kernel does it as well, or the host only waits.
    """

    name: str
    lane: str
    awaits: tuple[tuple[int, str], ...]
    kernel: Kernel | None = None
    copy: BoundCopy | None = None


def bind(plan: LayerPlan, method: Method) -> tuple[BoundOp, ...]:
    """A plan's operations in their order, each with what runs it."""
    buffers, bound, copies = {b.name: b for b in plan.buffers}, [], 0
    for op in plan.ops:
        awaits = tuple(_awaited(name) for name in op.after)
        if isinstance(op, Copy):
            src, dst = buffers[op.src].tier, buffers[op.dst].tier
            copy = BoundCopy(copies, method.routes[op.name], src, dst)
            lane = op.engine.value if op.engine is Engine.GATHER else f"{op.engine}:{src}->{dst}"
            bound.append(BoundOp(name=op.name, lane=lane, awaits=awaits, copy=copy))
            copies += 1
        else:
            lane = HOST if isinstance(op, Sync) or op.processor is Processor.CPU else MODEL_LANE
            kernel = None if isinstance(op, Sync) else method.kernels.get(op.name)
            bound.append(BoundOp(name=op.name, lane=lane, awaits=awaits, kernel=kernel))
    return tuple(bound)


def _leading(ops: Sequence[BoundOp]) -> tuple[BoundOp, ...]:
    """The copies at the head of a plan that wait for nothing of their own layer."""
    for number, op in enumerate(ops):
        if op.copy is None or any(back == 0 for back, _ in op.awaits):
            return tuple(ops[:number])
    return tuple(ops)


def _awaited(name: str) -> tuple[int, str]:
    base, _, back = name.partition("@")
    return -int(back) if back else 0, base


class Bound:
    """A layer's operations and tensors, with `counted` as the step has it that was asked for last.

    `state` is (batch, rows, *row_shape) by buffer name; `leading` are the copies that may begin before the layer does.
    """

    def __init__(self, plan: LayerPlan, method: Method, arena: Arena, layer: int) -> None:
        self.ops, self.counted = bind(plan, method), counted(plan)
        self.leading = _leading(self.ops)
        self.state = arena.tensors(layer, plan.buffers)
        self._arena, self._layer = arena, layer
        self._revision = arena.revision

    def current(self, arena: Arena) -> bool:
        """Whether the tensors are still those of the arena."""
        return self._arena is arena and self._revision == arena.revision

    def refresh(self, answer: Counted) -> None:
        """Take over what another step of the same structure says."""
        for known, ring in zip(self.counted.rings, answer.rings, strict=True):
            if ring != known:
                self.state[ring.name] = self._arena.ring(self._layer, ring)
        self.counted = answer


class BoundLayer:
    """One layer of one cache: its plan is bound when a step has a structure that has not been met."""

    def __init__(self, plans: LayerPlans, method: Method, layer: int) -> None:
        self._plans, self._method, self._layer = plans, method, layer
        self._bound: dict[Derived, Bound] = {}

    def at(self, step: Step, arena: Arena) -> Bound:
        """The layer at a step. Decode steps of one structure have one binding, refreshed; others one of their own."""
        piece = self._plans.piece(step)
        answer = None if piece is None else piece.at(step)
        if piece is None or answer is None:
            plan = self._plans.plan(step)
            if step.prefilling:  # a ring may have to grow with the chunk
                arena.allocate(self._layer, [b for b in plan.buffers if b.ring])
            return Bound(plan, self._method, arena, self._layer)
        bound = self._bound.get(piece)
        if bound is None or not bound.current(arena):
            if len(self._bound) == PIECES:
                self._bound.clear()
            bound = self._bound[piece] = Bound(self._plans.plan(step), self._method, arena, self._layer)
        if answer is not bound.counted:
            bound.refresh(answer)
        return bound
