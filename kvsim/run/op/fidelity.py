"""The `op` fidelity: every operation is a process, and the copies and CPU work of a host's GPUs compete.

What a replica does next is decided by the same inner loop as in the step fidelity, iteration by iteration; here SimPy
is the clock, and an iteration lasts until its last operation has ended.
"""

import math
from collections.abc import Generator, Sequence

import simpy

from kvsim.engine.desk import Engine
from kvsim.engine.state.cluster import ITERATING, NOBODY, STALLED
from kvsim.iteration.timeline import STALL
from kvsim.run.op.links import Links, networks
from kvsim.run.op.pipeline import Pipeline
from kvsim.run.op.rank import Rank
from kvsim.run.op.transfers import Process, Transfers
from kvsim.scenario.setup import Setup

EVENTS_AT_ONCE = 5000


def play_operations(engine: Engine, setup: Setup) -> Generator[int, None, None]:
    """Replay the trace of an engine; says how many requests have left, now and then."""
    env = simpy.Environment()
    stages = setup.stages
    links = [[Links(setup, number, stage) for stage in range(setup.pp)] for number in range(setup.replicas)]
    transfers: list[Transfers] = []
    replicas = []
    for number, network in enumerate(networks(env, setup, links)):
        transfers.append(Transfers(engine, setup, number, links[number], network, transfers))
        own = zip(links[number], stages.layers, strict=True)
        ranks = [Rank(network, engine, number, *one, stage) for stage, one in enumerate(own)]
        pipeline = Pipeline(engine, number, stages, ranks, links[number]) if setup.pp > 1 else None
        replicas.append(_Replica(env, engine, number, ranks, pipeline, transfers[number]))
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
        self,
        env: simpy.Environment,
        engine: Engine,
        number: int,
        ranks: Sequence[Rank],
        pipeline: Pipeline | None,
        transfers: Transfers,
    ) -> None:
        self.env, self.engine, self.number, self.ranks, self.transfers = env, engine, number, ranks, transfers
        self.pipeline = pipeline
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
            if record["phase"] == ITERATING and self.pipeline is not None:
                yield from self.pipeline.execute()
            elif record["phase"] == ITERATING:
                yield from self.ranks[0].execute(*self.engine.batch(self.number), self.transfers.streams())
            elif record["phase"] == STALLED:
                began_s = self.env.now
                yield from self.transfers.swap()
                for rank in self.ranks:
                    rank.note(STALL, ("waits for swaps", 0), began_s, self.env.now)
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
