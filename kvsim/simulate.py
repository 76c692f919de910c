"""One simulation: a trace replayed on a cluster of engine replicas, and what came of it."""

import gc
import time
from collections.abc import Callable, Generator

import numpy as np

from kvsim.derive import TIERS, PlanTable
from kvsim.engine.engine import Engine
from kvsim.makespan import Clock
from kvsim.op_fidelity import play_operations
from kvsim.outcome import Outcome
from kvsim.prefix_cache import LruTier, PrefixCache
from kvsim.results import Result
from kvsim.setup import Setup
from policies import Reuse, Step, plan_layer, reuse_of
from policies.plan import stored_bytes
from traces import Trace

__all__ = ["Setup", "simulate"]

TURNS_AT_ONCE = 5000  # between two looks at whether to go on


def simulate(trace: Trace, setup: Setup, progress: Callable[[int], None] | None = None) -> Result:
    """Replay `trace` on a cluster; `progress` is told how many requests have left, now and then.

    An interruption (Ctrl-C) ends the replay early: requests that had not finished are reported as such. Raises
    ValueError for a model that does not fit, and for prefix caches where the trace has no block ids.
    """
    began_s = time.perf_counter()
    cluster = _Cluster(trace, setup)
    setup_cpu_s = time.process_time()
    cluster.play(progress)
    cpu_s = time.process_time() - setup_cpu_s
    return cluster.outcome().result(wall_s=time.perf_counter() - began_s, cpu_s=cpu_s, setup_cpu_s=setup_cpu_s)


def compile_loop(trace: Trace, setup: Setup) -> None:
    """Have the inner loop compiled and on disk, so that processes beside each other need not each do it."""
    if setup.fidelity == "step":
        _Cluster(trace, setup)


class _Cluster:
    def __init__(self, trace: Trace, setup: Setup) -> None:
        self.trace, self.setup = trace, setup
        machine = setup.machine()
        table, clock = PlanTable(setup.policy, setup.rank, machine, setup.counts), Clock(setup.rank, machine)
        lengths = np.quantile(trace.prompt_tokens, (0.0, 0.25, 0.5, 0.75, 1.0), method="nearest")
        table.warm([int(n) for n in lengths], setup.max_num_batched_tokens)
        self.ddr_tiers: list[LruTier] = []
        self.hbm_tiers: list[LruTier] = []
        caches = []
        for index in range(setup.replicas):
            if index % setup.replicas_per_host == 0:
                self.ddr_tiers.append(LruTier(setup.prefix_cache_ddr_bytes))
            caches.append(self._cache())
        self.engine = Engine(trace, setup, table, clock, caches)

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

    def play(self, progress: Callable[[int], None] | None) -> None:
        """Run until nothing is left to happen."""
        steps = self.setup.fidelity == "step"
        play = _play_steps(self.engine) if steps else play_operations(self.engine, self.setup)
        gc.freeze()  # what was loaded before is here to stay: collections need not walk it again and again
        try:
            for left in play:
                if progress is not None:
                    progress(left)
        except KeyboardInterrupt:
            return
        finally:
            gc.unfreeze()

    def outcome(self) -> Outcome:
        """What has been recorded so far."""
        return Outcome(
            setup=self.setup,
            trace=self.trace,
            engine=self.engine,
            tiers={"hbm": self.hbm_tiers, "ddr": self.ddr_tiers},
        )


def _play_steps(engine: Engine) -> Generator[int, None, None]:
    """The step fidelity: replicas take turns by themselves; says how many requests have left, now and then."""
    while engine.play(TURNS_AT_ONCE):
        yield engine.left
    yield engine.left


def _token_bytes(setup: Setup) -> list[int]:
    """Bytes per tier that one rank keeps for each further token of a long prompt, staging aside."""
    kept = []
    for tokens in (1 << 20, 1 << 21):
        step = Step.decoding(tokens, 1)
        plans = [plan_layer(setup.policy, setup.rank, step, layer) for layer in range(setup.rank.n_layers)]
        stored = stored_bytes([[b for b in plan.buffers if not b.ring] for plan in plans])
        kept.append([stored[tier] for tier in TIERS])
    return [-(-(longer - long) // (1 << 20)) for long, longer in zip(*kept, strict=True)]
