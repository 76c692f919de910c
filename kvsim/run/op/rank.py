"""A rank of the `op` fidelity runs an iteration: its operations on their lanes, each a process that may have to share.

Lanes are the same in-order queues as in the step fidelity; what differs is that a transfer's rate depends on what else
moves at that moment, where the step fidelity gives each GPU what its neighbours leave on average.
"""

from collections.abc import Sequence
from contextlib import suppress

import simpy

from kvsim.engine.desk import Engine
from kvsim.hardware.fairshare import FairShare
from kvsim.hardware.machine import CPU, D2H, H2D, LANES, NVLINK, SM
from kvsim.iteration.clock import Iteration, Load
from kvsim.iteration.program import Slot
from kvsim.iteration.timeline import operation_names
from kvsim.run.op.links import Links
from kvsim.run.op.transfers import LayerDone, Process

_What = tuple[str, int]  # an operation's name and its layer


class Rank:
    """The ranks of a stage do the same at the same time, so one stands for all and takes `tp` shares of the host.

    `layers` are those of the stage; all of them by default.
    """

    def __init__(
        self,
        network: FairShare,
        engine: Engine,
        number: int,
        links: Links,
        layers: range | None = None,
        stage: int = 0,
    ) -> None:
        self.env, self.network, self.clock, self._layers = network.env, network, engine.clock, layers
        self._timeline, self._number, self._stage = engine.timeline, number, stage
        self.hides = False  # what may be given up
        self._hidden: list[tuple[int, _What, float, float]] = []
        self._running: list[simpy.Process] = []  # operations of the iteration under way, and some that are done
        self._uses = {CPU: links.cpu, H2D: links.h2d, D2H: links.d2h, NVLINK: links.ring}

    def note(self, lane: int, what: _What, begin_s: float, end_s: float) -> None:
        """Show an operation in the timeline, where one is asked for."""
        if self.hides:
            self._hidden.append((lane, what, begin_s, end_s))
        elif self._timeline is not None:
            self._timeline.add(self._number, lane, *what, begin_s, end_s, self._stage)

    def show(self) -> None:
        """What has been hidden is not given up."""
        self.hides, hidden, self._hidden = False, self._hidden, []
        for one in hidden:
            self.note(*one)

    def execute(
        self, loads: list[Load], tokens: int, logits: int, guess_s: float, layer_done: LayerDone | None
    ) -> Process:
        """Run one iteration from its first operation to its last, and tell what each layer's end depends on."""
        work, layer = self.clock.work(loads, tokens, layers=self._layers), (self._layers or range(1)).start - 1
        self._running = []
        names = operation_names(self.clock, [load.structure for load in loads])
        tails: list[simpy.Event | None] = [None] * len(LANES)
        done: list[list[simpy.Event | None]] = [[None] * work.program.slots for _ in range(work.program.depth + 1)]
        for repeat, slots in work.program.runs:
            for _ in range(repeat):
                layer += 1
                done.insert(0, done.pop())
                done[0][:] = [None] * work.program.slots
                for slot in slots:
                    waits = [tails[slot.lane], *(done[back][other] for back, other in slot.waits)]
                    what = names[slot.time], layer
                    finished = self._start(slot, what, waits, work)
                    if work.seconds[slot.time]:
                        tails[slot.lane] = finished
                        if slot.sm_share:  # the SMs lose this much time to the kernel that copies
                            tails[SM] = self._run(
                                self._after(SM, what, [tails[SM]], slot.sm_share * work.seconds[slot.time])
                            )
                    done[0][slot.slot] = finished
                if layer_done is not None:
                    layer_done([finished for finished in done[0] if finished is not None])
        for slot in work.program.end:
            tails[slot.lane] = self._start(slot, (names[slot.time], layer), list(tails), work)
        yield self.env.all_of([tail for tail in tails if tail is not None])
        if logits:
            began_s = self.env.now
            yield self.env.timeout(self.clock.head_s(logits))
            self.note(SM, ("head", 0), began_s, self.env.now)
        if guess_s:
            began_s = self.env.now
            yield self.env.timeout(guess_s)
            self.note(SM, ("guess", 0), began_s, self.env.now)

    def abandon(self) -> None:
        """Let nothing of the iteration under way go on; whoever runs it is not told."""
        for operation in self._running:
            if operation.is_alive:
                operation.interrupt()
        self._running, self._hidden = [], []

    def _run(self, operation: Process) -> simpy.Process:
        running = self.env.process(operation)
        self._running.append(running)
        return running

    def _start(self, slot: Slot, what: _What, waits: Sequence[simpy.Event | None], work: Iteration) -> simpy.Event:
        alone_s, fixed_s, moved = (row[slot.time] for row in (work.seconds, work.fixed_s, work.nbytes))
        shares = self._uses.get(slot.lane)
        if shares is None or alone_s <= fixed_s:
            return self._run(self._after(slot.lane, what, waits, alone_s))
        flowing_s = alone_s - fixed_s
        amount, cap = (flowing_s, 1.0) if slot.lane == CPU else (float(moved), moved / flowing_s)
        return self._run(self._flow(slot.lane, what, waits, fixed_s, (amount, cap, shares)))

    def _after(self, lane: int, what: _What, waits: Sequence[simpy.Event | None], seconds: float) -> Process:
        with suppress(simpy.Interrupt):
            yield self.env.all_of([w for w in waits if w is not None])
            if seconds:
                began_s = self.env.now
                yield self.env.timeout(seconds)
                self.note(lane, what, began_s, self.env.now)

    def _flow(
        self,
        lane: int,
        what: _What,
        waits: Sequence[simpy.Event | None],
        fixed_s: float,
        flow: tuple[float, float, dict[str, float]],
    ) -> Process:
        flowing = None
        try:
            yield self.env.all_of([w for w in waits if w is not None])
            began_s = self.env.now
            if fixed_s:
                yield self.env.timeout(fixed_s)
            flowing = self.network.flow(*flow)
            yield flowing
            self.note(lane, what, began_s, self.env.now)
        except simpy.Interrupt:
            if flowing is not None:
                self.network.stop(flowing)
