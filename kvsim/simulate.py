"""One simulation: a trace replayed on a cluster of engine replicas, and what came of it."""

import gc
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import simpy

from kvsim.derive import TIERS, PlanTable
from kvsim.ledger import Ledger
from kvsim.makespan import Clock
from kvsim.neighbours import Neighbours
from kvsim.op_fidelity import Node
from kvsim.outcome import Outcome
from kvsim.prefix_cache import LruTier, PrefixCache
from kvsim.replica import Replica
from kvsim.results import Result
from kvsim.room import Limits
from kvsim.sequence import Sequence as Request
from kvsim.setup import Setup
from policies import Reuse, Step, plan_layer, reuse_of
from policies.plan import stored_bytes
from traces import Trace

__all__ = ["Setup", "simulate"]


def simulate(trace: Trace, setup: Setup, progress: Callable[[int], None] | None = None) -> Result:
    """Replay `trace` on a cluster; `progress` is told how many requests have left, now and then.

    An interruption (Ctrl-C) ends the replay early: requests that had not finished are reported as such. Raises
    ValueError for a model that does not fit, and for prefix caches where the trace has no block ids.
    """
    began_s = time.perf_counter()
    env = simpy.Environment()
    cluster = _Cluster(env, trace, setup)
    env.process(cluster.arrivals())
    setup_cpu_s = time.process_time()
    cluster.play(progress)
    cpu_s = time.process_time() - setup_cpu_s
    return cluster.outcome().result(wall_s=time.perf_counter() - began_s, cpu_s=cpu_s, setup_cpu_s=setup_cpu_s)


class _Cluster:
    def __init__(self, env: simpy.Environment, trace: Trace, setup: Setup) -> None:
        self.env, self.trace, self.setup = env, trace, setup
        capacity = setup.capacity()
        machine = setup.machine()
        self.table = PlanTable(setup.policy, setup.rank, machine, setup.counts)
        self.clock = Clock(setup.rank, machine)
        lengths = np.quantile(trace.prompt_tokens, (0.0, 0.25, 0.5, 0.75, 1.0), method="nearest")
        self.table.warm([int(n) for n in lengths], setup.max_num_batched_tokens)
        self.requests = [
            Request(i, arrival, prompt, output, trace.blocks(i).tolist() if trace.block_tokens else ())
            for i, (arrival, prompt, output) in enumerate(
                zip(trace.arrival_s.tolist(), trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)
            )
        ]
        self.replica_of = np.zeros(len(trace), dtype=np.int64)
        limits = Limits(
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            capacity=capacity,
            preemption=setup.preemption,
        )
        self.ddr_tiers: list[LruTier] = []
        self.hbm_tiers: list[LruTier] = []
        self.ledgers: list[Ledger] = []
        self.replicas: list[Replica] = []
        for index in range(setup.replicas):
            position = index % setup.replicas_per_host
            if position == 0:
                self.ddr_tiers.append(LruTier(setup.prefix_cache_ddr_bytes))
                node = Node(env, setup.gpu, setup.host) if setup.fidelity == "op" else None
                neighbours = Neighbours(machine)
            ledger = Ledger(self.clock, setup.rank.weight_bytes)
            execute = node.attach(self.clock, position) if node else None
            self.ledgers.append(ledger)
            cache = self._cache()
            self.replicas.append(Replica(env, self.table, self.clock, limits, cache, ledger, neighbours, execute))

    def _cache(self) -> PrefixCache | None:
        setup = self.setup
        reuse = reuse_of(setup.policy)
        if not (setup.prefix_cache_hbm_bytes or setup.prefix_cache_ddr_bytes) or reuse is Reuse.NOTHING:
            return None
        if not self.trace.block_tokens:
            raise ValueError(
                f"trace {self.trace.name!r} has no block ids, so no prefix can be cached; leave --prefix-cache-* out"
            )
        self.hbm_tiers.append(LruTier(setup.prefix_cache_hbm_bytes // setup.replicas_per_host))
        per_token = [n * setup.tp for n in _token_bytes(setup)]
        return PrefixCache(
            reuse,
            self.trace.block_tokens,
            sum(per_token),
            per_token[0],
            self.hbm_tiers[-1],
            self.ddr_tiers[-1],
            ranks=setup.tp,
            replicas=setup.replicas_per_host,
        )

    def arrivals(self) -> Generator[simpy.Event, Any, None]:
        """Hand each request to a replica when it arrives."""
        for request in self.requests:
            while request.arrival_s > self.env.now:  # twice where now + (arrival - now) rounds below the arrival
                yield self.env.timeout(request.arrival_s - self.env.now)
            chosen = self._route(request.index)
            self.replica_of[request.index] = chosen
            self.replicas[chosen].submit(request)

    def _route(self, index: int) -> int:
        if self.setup.router == "round-robin":
            return index % len(self.replicas)
        return min(range(len(self.replicas)), key=lambda i: self.replicas[i].outstanding_tokens)

    def play(self, progress: Callable[[int], None] | None) -> None:
        """Run until nothing is left to happen."""
        gc.freeze()  # what was loaded before is here to stay: collections need not walk it again and again
        try:
            if progress is None:
                self.env.run()
                return
            while self.env.peek() != float("inf"):
                for _ in range(5000):
                    if self.env.peek() == float("inf"):
                        break
                    self.env.step()
                progress(sum(replica.left for replica in self.replicas))
        except KeyboardInterrupt:
            return
        finally:
            gc.unfreeze()

    def outcome(self) -> Outcome:
        """What has been recorded so far."""
        return Outcome(
            setup=self.setup,
            trace=self.trace,
            requests=self.requests,
            replica_of=self.replica_of,
            ledgers=self.ledgers,
            tiers={"hbm": self.hbm_tiers, "ddr": self.ddr_tiers},
        )


def _token_bytes(setup: Setup) -> list[int]:
    """Bytes per tier that one rank keeps for each further token of a long prompt, staging aside."""
    kept = []
    for tokens in (1 << 20, 1 << 21):
        step = Step.decoding(tokens, 1)
        plans = [plan_layer(setup.policy, setup.rank, step, layer) for layer in range(setup.rank.n_layers)]
        stored = stored_bytes([[b for b in plan.buffers if not b.ring] for plan in plans])
        kept.append([stored[tier] for tier in TIERS])
    return [-(-(longer - long) // (1 << 20)) for long, longer in zip(*kept, strict=True)]
