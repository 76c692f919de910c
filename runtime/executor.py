"""Walks a layer's bound plan: copies go to the mover, kernels to the policy's method, in the order of the plan.

Beside a GPU each lane is a CUDA stream and `after` an event; on a CPU operations simply run one after the other.
"""

from collections import deque
from collections.abc import Sequence

import torch

from policies.plan import Plan, Rows
from runtime.bound import HOST, MODEL_LANE, Bound, BoundOp
from runtime.call import Call, Method
from runtime.derived import Counted
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

    def gather_lanes(self) -> None:
        """Let what the model does next wait for every lane; the lanes wait for nothing, as a graph's end asks."""
        for lane in self._lanes.values():
            torch.cuda.current_stream(self.device).wait_stream(lane)

    def settle(self) -> None:
        """Let the host wait for all that was issued, before it reads or erases memory of its own."""
        self.join()
        if self._cuda:
            torch.cuda.current_stream(self.device).synchronize()

    def run(self, bound: Bound, call: Call) -> None:
        """Run every operation of a layer that has not been issued ahead.

        Raises RuntimeError when a route moves other bytes than the plan says, or `attend` leaves no output.
        """
        self._begin_layer()
        if self._cuda:
            self._record("qkv")
        for op in bound.ops:
            if op.name not in self._ahead:
                self._issue(op, bound.counted, call)
        self._ahead.clear()
        if self._cuda:
            torch.cuda.current_stream(self.device).wait_event(self._events[0]["attend"])
        if call.out is None:
            raise RuntimeError("the operation 'attend' left no output")

    def run_ahead(self, bound: Bound, call: Call) -> None:
        """Issue what the next layer lets begin before the model has come to it: its leading copies.

        `call` has that layer's state and nothing that the model hands over.
        """
        self._events.appendleft({})
        for op in bound.leading:
            self._issue(op, bound.counted, call)
        self._ahead = {op.name for op in bound.leading}

    def run_end(self, plan: Plan, method: Method, calls: Sequence[Call]) -> None:
        """Run the whole-model work after the last layer of a prompt."""
        self.join()
        for op in plan:
            if op.name not in method.fused:
                method.ends[op.name](calls)

    def _begin_layer(self) -> None:
        if not self._ahead:
            self._events.appendleft({})

    def _issue(self, op: BoundOp, counted: Counted, call: Call) -> None:
        """Issue an operation on its lane's stream, after what it waits for; on a CPU simply run it."""
        if not self._cuda:
            self._do(op, counted, call)
        elif op.lane == HOST:
            for event in self._awaited(op):
                event.synchronize()
            self._do(op, counted, call)
        else:
            stream = self._stream(op.lane)
            for event in self._awaited(op):
                stream.wait_event(event)
            with torch.cuda.stream(stream):
                self._do(op, counted, call)
                self._record(op.name)

    def _do(self, op: BoundOp, counted: Counted, call: Call) -> None:
        if op.kernel is not None:
            op.kernel(call)
        if op.copy is not None:
            moved = self.mover.move(op.copy.route(call), op.copy.src, op.copy.dst)
            _check(op.name, *counted.copies[op.copy.number], call, moved)

    def _stream(self, lane: str) -> "torch.cuda.Stream":
        current = torch.cuda.current_stream(self.device)
        if lane == MODEL_LANE:
            return current
        if lane not in self._lanes:
            self._lanes[lane] = torch.cuda.Stream(self.device)
            self._lanes[lane].wait_stream(current)
        return self._lanes[lane]

    def _awaited(self, op: BoundOp) -> list["torch.cuda.Event"]:
        """The events of what has been issued of the operations that one waits for."""
        found = []
        for layer, name in op.awaits:
            if layer < len(self._events) and name in self._events[layer]:
                found.append(self._events[layer][name])
        return found

    def _record(self, name: str) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._events[0][name] = event


def _check(name: str, planned: Rows, row_bytes: int, call: Call, moved: int | None) -> None:
    """Compare what a copy has moved with what the plan says, exactly."""
    if moved is None:  # a kernel counts on its device: comparing would wait for it
        return
    rows = len(call.q) * planned.fixed
    rows += sum(coefficient * int(call.counts[drawn].sum()) for drawn, coefficient in planned.counts)
    if moved != rows * row_bytes:
        raise RuntimeError(f"{name} moved {moved} bytes where its plan says {rows * row_bytes}")
