"""Walks a layer's plan: copies go to the mover, kernels to the policy's method, in the order of the plan.

Beside a GPU each lane is a CUDA stream and `after` an event; on a CPU operations simply run one after the other.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from policies import LayerPlan, Step
from policies.model import LayerShape
from policies.plan import Compute, Copy, Engine, Op, Processor, Sync
from runtime.mover import Mover, Piece

HISTORY = 4  # layers whose events are kept for `op@-k`


@dataclass(slots=True)
class Call:
    """One attention call of one layer: what the model hands over, what the arena holds, what the kernels leave.

    `q` is (batch, heads, new_tokens, head_dim), `new_k` and `new_v` (batch, kv_heads, new_tokens, head_dim); `mask` is
    (batch, 1, new_tokens or 1, tokens), True where a query may look, or None: causal and without padding. The operation
    `attend` sets `out`, shaped as `q`.
    """

    shape: LayerShape
    step: Step
    state: Mapping[str, torch.Tensor]
    q: torch.Tensor
    new_k: torch.Tensor
    new_v: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    out: torch.Tensor | None = None
    counts: dict[str, int] = field(default_factory=dict)
    scratch: dict[str, torch.Tensor] = field(default_factory=dict)


Kernel = Callable[[Call], None]
Route = Callable[[Call], list[Piece]]


@dataclass(frozen=True, slots=True)
class Method:
    """A policy's torch code: a kernel for each `Compute`, a route (what goes where) for each `Copy`, by name.

    `fused` names operations that another kernel does as well.
    """

    kernels: Mapping[str, Kernel]
    routes: Mapping[str, Route] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()

    def missing(self, plan: LayerPlan) -> list[str]:
        """Operations of a plan that nothing executes."""
        known = {*self.kernels, *self.routes, *self.fused}
        return [op.name for op in plan.ops if not isinstance(op, Sync) and op.name not in known]


class Executor:
    """Executes plans on one device."""

    def __init__(self, device: torch.device, mover: Mover) -> None:
        self.device, self.mover = device, mover
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._events: deque[dict[str, torch.cuda.Event]] = deque(maxlen=HISTORY)

    def run(self, plan: LayerPlan, method: Method, call: Call) -> None:
        """Run every operation of a layer's plan.

        Raises RuntimeError when a route moves other bytes than the plan says, or `attend` leaves no output.
        """
        self._events.appendleft({})
        buffers = {b.name: b for b in plan.buffers}
        batch = call.q.shape[0]
        for op in plan.ops:
            with self._lane(op):
                if isinstance(op, Copy):
                    src, dst = buffers[op.src], buffers[op.dst]
                    moved = self.mover.copy(method.routes[op.name](call), src.tier, dst.tier)
                    planned = op.rows.at(call.counts)
                    planned = planned * src.row_bytes * (1 if op.rows.counts else batch)
                    if moved != planned:
                        raise RuntimeError(f"{op.name} moved {moved} bytes where its plan says {planned}")
                elif isinstance(op, Compute):
                    if op.name in method.kernels:
                        method.kernels[op.name](call)
                elif self.device.type == "cuda":
                    torch.cuda.current_stream(self.device).synchronize()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(self._events[0]["attend"])
        if call.out is None:
            raise RuntimeError("the operation 'attend' left no output")

    def _lane(self, op: Op) -> "_Lane":
        return _Lane(self, op)

    def stream_of(self, op: Op) -> "torch.cuda.Stream":
        """The stream of an operation's lane; compute stays on the stream that the model runs on."""
        if isinstance(op, Copy):
            lane = f"{op.src}->{op.dst}" if op.engine is Engine.CPU else op.engine.value
        elif isinstance(op, Compute) and op.processor is Processor.CPU:
            lane = "cpu"
        else:
            return torch.cuda.current_stream(self.device)
        if lane not in self._streams:
            self._streams[lane] = torch.cuda.Stream(self.device)
        return self._streams[lane]

    def events(self, name: str) -> list["torch.cuda.Event"]:
        """What `after=name` waits for, if it has been issued."""
        base, _, back = name.partition("@")
        layer = -int(back) if back else 0
        known = self._events[layer] if layer < len(self._events) else {}
        return [known[base]] if base in known else []

    def record(self, op: Op, stream: "torch.cuda.Stream") -> None:
        """Remember that an operation was issued."""
        event = torch.cuda.Event()
        event.record(stream)
        self._events[0][op.name] = event


class _Lane:
    """Issues what is inside it on an operation's stream, after what the operation waits for."""

    def __init__(self, executor: Executor, op: Op) -> None:
        self.executor, self.op = executor, op
        self.context: torch.cuda.StreamContext | None = None

    def __enter__(self) -> None:
        if self.executor.device.type != "cuda":
            return
        stream = self.executor.stream_of(self.op)
        stream.wait_stream(torch.cuda.current_stream(self.executor.device))  # what the model has handed over
        for name in self.op.after:
            for event in self.executor.events(name):
                stream.wait_event(event)
        self.context = torch.cuda.stream(stream)
        self.context.__enter__()

    def __exit__(self, *exception: object) -> None:
        if self.context is None:
            return
        self.executor.record(self.op, torch.cuda.current_stream(self.executor.device))
        self.context.__exit__(*exception)
