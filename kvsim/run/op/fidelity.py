"""The `op` fidelity: every operation is a process, and the copies and CPU work of a host's GPUs compete.

What a replica does next is decided by the same inner loop as in the step fidelity, iteration by iteration; here SimPy
is the clock, and an iteration lasts until its last operation has ended.

Lanes are the same in-order queues as in the step fidelity; what differs is that a transfer's rate depends on what else
moves at that moment, where the step fidelity gives each GPU a fixed share of the host.
"""

import math
from collections.abc import Generator, Sequence

import simpy

from kvsim.engine.desk import Engine
from kvsim.engine.state.cluster import ITERATING, NOBODY, STALLED
from kvsim.hardware.fairshare import FairShare
from kvsim.hardware.machine import CPU, D2H, H2D, LANES, NVLINK, SM
from kvsim.iteration.clock import Iteration, Load
from kvsim.iteration.program import Slot
from kvsim.iteration.timeline import STALL, operation_names
from kvsim.run.op.transfers import LayerDone, Links, Process, Transfers, networks
from kvsim.scenario.setup import Setup

_What = tuple[str, int]  # an operation's name and its layer
EVENTS_AT_ONCE = 5000


def play_operations(engine: Engine, setup: Setup) -> Generator[int, None, None]:
    """Replay the trace of an engine; says how many requests have left, now and then."""
    env = simpy.Environment()
    links = [Links(setup, number) for number in range(setup.replicas)]
    transfers: list[Transfers] = []
    replicas = []
    for number, network in enumerate(networks(env, setup, links)):
        transfers.append(Transfers(engine, setup, number, links[number], network, transfers))
        rank = _Rank(network, engine, number, links[number])
        replicas.append(_Replica(env, engine, number, rank, transfers[number]))
    if setup.prefill_gpus:
        for replica in replicas:
            replica.beside = replicas
    arrivals = _Arrivals(env, engine, replicas)
    if setup.sessions == "closed":
        for replica in replicas:
            replica.arrivals = arrivals
    while env.peek() != math.inf:
        for _ in range(EVENTS_AT_ONCE):
            if env.peek() == math.inf:
                break
            env.step()
        yield engine.left


class _Arrivals:
    """Hands each request to a replica when it arrives, and takes it away when it loses patience."""

    def __init__(self, env: simpy.Environment, engine: Engine, replicas: "Sequence[_Replica]") -> None:
        self.env, self.engine, self.replicas = env, engine, replicas
        self._next = NOBODY
        self._other: simpy.Event = env.event()
        env.process(self._run())

    def look(self) -> None:
        """A replica has begun what is next: in closed loop, a request that left may let another come."""
        if self.engine.next_arrival() != self._next and not self._other.triggered:
            self._other.succeed()

    def _run(self) -> Process:
        requests = self.engine.cluster.requests
        while True:
            self._next = self.engine.next_arrival()
            arrival_s = math.inf if self._next == NOBODY else float(requests[self._next]["arrival_s"])
            leaving, departure_s = self.engine.next_departure()
            if arrival_s <= self.env.now:
                self.replicas[self.engine.arrive(self._next, self.env.now)].look()
                continue
            if departure_s <= self.env.now:
                self.replicas[self.engine.depart(leaving, self.env.now)].look()
                continue
            self._other = self.env.event()
            waits, next_s = [self._other], min(arrival_s, departure_s)
            if next_s < math.inf:  # twice where now + (next - now) rounds below the next
                waits.append(self.env.timeout(next_s - self.env.now))
            yield self.env.any_of(waits)


class _Replica:
    """The clock of one replica."""

    def __init__(
        self, env: simpy.Environment, engine: Engine, number: int, rank: "_Rank", transfers: Transfers
    ) -> None:
        self.env, self.engine, self.number, self.rank, self.transfers = env, engine, number, rank, transfers
        transfers.wake = self.look
        self._wake: simpy.Event = env.event()
        self._until_s = math.inf
        self.beside: Sequence[_Replica] = ()
        self.arrivals: _Arrivals | None = None
        env.process(self._run())

    def look(self) -> None:
        """A request has arrived, or another replica's work has an effect: an idle replica may have to wake up."""
        if self.engine.cluster.replicas[self.number]["wake_s"] < self._until_s and not self._wake.triggered:
            self._wake.succeed()

    def _run(self) -> Process:
        record = self.engine.cluster.replicas[self.number]
        while True:
            if record["phase"] == ITERATING:
                yield from self.rank.execute(*self.engine.batch(self.number), self.transfers.streams())
            elif record["phase"] == STALLED:
                began_s = self.env.now
                yield from self.transfers.swap()
                self.rank.note(STALL, ("waits for swaps", 0), began_s, self.env.now)
            else:
                self._wake = self.env.event()
                self._until_s = ready_s = float(record["wake_s"])
                if ready_s <= self.env.now:
                    pass
                elif ready_s < math.inf:
                    yield self._wake | self.env.timeout(ready_s - self.env.now)
                else:
                    yield self._wake
            self._until_s = -math.inf  # nobody need wake it
            self.engine.step(self.number, self.env.now)
            self.transfers.set_out()
            for other in self.beside:
                other.look()
            if self.arrivals is not None:
                self.arrivals.look()


class _Rank:
    """A replica's ranks do the same at the same time, so one stands for all and takes `tp` shares of the host."""

    def __init__(self, network: FairShare, engine: Engine, number: int, links: Links) -> None:
        self.env, self.network, self.clock = network.env, network, engine.clock
        self._timeline, self._number = engine.timeline, number
        self._uses = {CPU: links.cpu, H2D: links.h2d, D2H: links.d2h, NVLINK: links.ring}

    def note(self, lane: int, what: _What, begin_s: float, end_s: float) -> None:
        """Show an operation in the timeline, where one is asked for."""
        if self._timeline is not None:
            self._timeline.add(self._number, lane, *what, begin_s, end_s)

    def execute(
        self, loads: list[Load], tokens: int, logits: int, guess_s: float, layer_done: LayerDone | None
    ) -> Process:
        """Run one iteration from its first operation to its last, and tell what each layer's end depends on."""
        work, layer = self.clock.work(loads, tokens), -1
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
                            tails[SM] = self.env.process(
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

    def _start(self, slot: Slot, what: _What, waits: Sequence[simpy.Event | None], work: Iteration) -> simpy.Event:
        alone_s, fixed_s, moved = (row[slot.time] for row in (work.seconds, work.fixed_s, work.nbytes))
        shares = self._uses.get(slot.lane)
        if shares is None or alone_s <= fixed_s:
            return self.env.process(self._after(slot.lane, what, waits, alone_s))
        flowing_s = alone_s - fixed_s
        amount, cap = (flowing_s, 1.0) if slot.lane == CPU else (float(moved), moved / flowing_s)
        return self.env.process(self._flow(slot.lane, what, waits, fixed_s, (amount, cap, shares)))

    def _after(self, lane: int, what: _What, waits: Sequence[simpy.Event | None], seconds: float) -> Process:
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
        yield self.env.all_of([w for w in waits if w is not None])
        began_s = self.env.now
        if fixed_s:
            yield self.env.timeout(fixed_s)
        yield self.network.flow(*flow)
        self.note(lane, what, began_s, self.env.now)
