"""Walks a layer's plan: copies go to the mover, kernels to the policy's method, in the order of the plan.

Beside a GPU each lane is a CUDA stream and `after` an event; on a CPU operations simply run one after the other.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from policies import LayerPlan
from policies.plan import Buffer, Compute, Copy, Engine, Op, Plan, Processor, Sync
from runtime.call import Call, Method
from runtime.mover import Mover

HISTORY = 4  # layers whose events are kept for `op@-k`

Events = dict[str, "torch.cuda.Event"]


class Executor:
    """Executes plans on one device, layer after layer."""

    def __init__(self, device: torch.device, mover: Mover) -> None:
        self.device, self.mover = device, mover
        self._cuda = device.type == "cuda"
        self._lanes: dict[str, torch.cuda.Stream] = {}
        self._events: deque[Events] = deque(maxlen=HISTORY)  # this layer's first
        self._ahead: set[str] = set()  # operations of the next layer that were issued early

    def begin(self) -> None:
        """A new step: no operation of it overtakes one of the step before."""
        self._events.clear()
        self._ahead.clear()
        self.join()

    def join(self) -> None:
        """Let every lane, and what the model does next, wait for all that was issued."""
        if not self._cuda:
            return
        current = torch.cuda.current_stream(self.device)
        for lane in self._lanes.values():
            current.wait_stream(lane)
        for lane in self._lanes.values():
            lane.wait_stream(current)

    def settle(self) -> None:
        """Let the host wait for all that was issued, before it reads or erases memory of its own."""
        self.join()
        if self._cuda:
            torch.cuda.current_stream(self.device).synchronize()

    def run(self, plan: LayerPlan, method: Method, call: Call) -> None:
        """Run every operation of a layer's plan that has not been issued ahead.

        Raises RuntimeError when a route moves other bytes than the plan says, or `attend` leaves no output.
        """
        self._begin_layer()
        if self._cuda:
            self._record("qkv")
        buffers = {b.name: b for b in plan.buffers}
        for op in plan.ops:
            if op.name not in self._ahead:
                self._issue(op, method, call, buffers)
        self._ahead.clear()
        if self._cuda:
            torch.cuda.current_stream(self.device).wait_event(self._events[0]["attend"])
        if call.out is None:
            raise RuntimeError("the operation 'attend' left no output")

    def run_ahead(self, plan: LayerPlan, method: Method, call: Call) -> None:
        """Issue what the next layer's plan lets begin before the model has come to it: its leading copies.

        `call` has that layer's state and nothing that the model hands over.
        """
        ready = []
        for op in plan.ops:
            if not isinstance(op, Copy) or any("@" not in name for name in op.after):
                break
            ready.append(op)
        if not ready:
            return
        self._events.appendleft({})
        buffers = {b.name: b for b in plan.buffers}
        for op in ready:
            self._issue(op, method, call, buffers)
        self._ahead = {op.name for op in ready}

    def run_end(self, plan: Plan, method: Method, calls: Sequence[Call]) -> None:
        """Run the whole-model work after the last layer of a prompt."""
        self.join()
        for op in plan:
            if op.name not in method.fused:
                method.ends[op.name](calls)

    def _begin_layer(self) -> None:
        if not self._ahead:
            self._events.appendleft({})

    def _issue(self, op: Op, method: Method, call: Call, buffers: dict[str, Buffer]) -> None:
        if isinstance(op, Sync):
            self._wait(op)
            return
        if not isinstance(op, Copy):
            with self._on_lane(op, ""):
                if op.name in method.kernels:
                    method.kernels[op.name](call)
            return
        src, dst = buffers[op.src], buffers[op.dst]
        lane = op.engine.value if op.engine is Engine.GATHER else f"{op.engine}:{src.tier}->{dst.tier}"
        with self._on_lane(op, lane):
            moved = self.mover.move(method.routes[op.name](call), src.tier, dst.tier)
        self._check(op, src, call, moved)

    def _check(self, op: Copy, src: Buffer, call: Call, moved: int | None) -> None:
        if moved is None:  # a kernel counts on its device: comparing would wait for it
            return
        rows = len(call.q) * op.rows.fixed
        rows += sum(coefficient * int(call.counts[name].sum()) for name, coefficient in op.rows.counts)
        if moved != rows * src.row_bytes:
            raise RuntimeError(f"{op.name} moved {moved} bytes where its plan says {rows * src.row_bytes}")

    def _wait(self, op: Op) -> None:
        """Let the host wait for what an operation comes after."""
        for event in self._awaited(op):
            event.synchronize()

    @contextmanager
    def _on_lane(self, op: Copy | Compute, lane: str) -> Iterator[None]:
        """Issue what is inside on a lane's stream, after what the operation waits for.

        The lane "" is the stream that the model runs on.
        """
        if not self._cuda:
            yield
            return
        if isinstance(op, Compute) and op.processor is Processor.CPU:
            self._wait(op)
            yield
            return
        stream = self._stream(lane)
        for event in self._awaited(op):
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            yield
            self._record(op.name)

    def _stream(self, lane: str) -> "torch.cuda.Stream":
        current = torch.cuda.current_stream(self.device)
        if not lane:
            return current
        if lane not in self._lanes:
            self._lanes[lane] = torch.cuda.Stream(self.device)
            self._lanes[lane].wait_stream(current)
        return self._lanes[lane]

    def _awaited(self, op: Op) -> list["torch.cuda.Event"]:
        """The events of what has been issued of an operation's `after`."""
        found = []
        for name in op.after:
            base, _, back = name.partition("@")
            layer = -int(back) if back else 0
            if layer < len(self._events) and base in self._events[layer]:
                found.append(self._events[layer][base])
        return found

    def _record(self, name: str) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._events[0][name] = event
