"""One simulation: a trace replayed on a cluster of engine replicas, and what came of it."""

import gc
import time
from collections.abc import Callable, Generator
from dataclasses import replace

import numpy as np

from kvsim.engine.caches.tiers import PrefixTiers, apart
from kvsim.engine.desk import Engine
from kvsim.iteration.clock import Clock
from kvsim.plans.derive import Pieces, PlanTable
from kvsim.plans.guessing import guesser_of
from kvsim.results.outcome import Outcome
from kvsim.results.summary import Result
from kvsim.scenario.setup import Setup
from policies.shown import shown
from traces import Trace

__all__ = ["Setup", "simulate"]

TURNS_AT_ONCE = 5000  # between two looks at whether to go on


MAX_ARRIVAL_S = 1e10  # three hundred years after 0


def simulate(
    trace: Trace,
    setup: Setup,
    progress: Callable[[int], None] | None = None,
    *,
    pieces: Pieces | None = None,
    runs: int = 1,
) -> Result:
    """Replay `trace` on a cluster; `progress` is told how many requests have left, first before any event.

    `pieces` keep what is derived of plans for simulations of the same policy, rank, machine, counts and guesses.
    `runs` is about how many simulations like this one this process is going to make: of many short ones none would be
    worth compiling for, and all of them are. An interruption (Ctrl-C) from there on ends the replay early: the result
    is `partial`, and requests that had not finished are reported as such. Raises
    ValueError for a model that does not fit, for prefix caches where the trace has no block ids, and for arrivals so
    late that floating-point times would lose latencies.
    """
    latest_s = float(trace.arrival_s[-1])
    if latest_s > MAX_ARRIVAL_S:
        raise ValueError(
            f"{trace.name}: a request arrives at {latest_s:g} s; must be at most {MAX_ARRIVAL_S:g} s, where times "
            "still have microseconds; is the unit of arrivals right?"
        )
    began_s = time.perf_counter()
    cluster = _Cluster(trace, setup, pieces, runs)
    setup_cpu_s = time.process_time()
    whole = cluster.play(progress)
    cpu_s = time.process_time() - setup_cpu_s
    result = cluster.outcome().result(wall_s=time.perf_counter() - began_s, cpu_s=cpu_s, setup_cpu_s=setup_cpu_s)
    return result if whole else replace(result, partial=True)


class _Cluster:
    def __init__(self, trace: Trace, setup: Setup, pieces: Pieces | None = None, runs: int = 1) -> None:
        self.trace, self.setup = trace, setup
        if (trace.session < 0).all():
            for option, without in (("sessions", "open"), ("session_kv", "recompute")):
                if getattr(setup, option) != without:
                    raise ValueError(f"trace {shown(trace.name)} has no sessions; replay it with {option}={without}")
        machine = setup.machine()
        guesser = guesser_of(setup)
        rank = setup.rank
        table = PlanTable(setup.policy, rank, machine, setup.counts, guesser, pieces)
        clock = Clock(rank, machine, guesser)
        lengths = np.quantile(trace.prompt_tokens, (0.0, 0.25, 0.5, 0.75, 1.0), method="nearest")
        table.warm([int(n) for n in lengths], setup.max_num_batched_tokens)
        blocks = (
            apart(trace) if setup.prefix_cache_sharing == "tenant" and any(setup.prefix_cache_bytes.values()) else trace
        )
        self.prefixes = PrefixTiers(blocks, setup)
        self.engine = Engine(blocks, setup, table, clock, self.prefixes, runs)

    def play(self, progress: Callable[[int], None] | None) -> bool:
        """Run until nothing is left to happen; False when interrupted before."""
        steps = self.setup.fidelity == "step"
        play = _play_steps(self.engine) if steps else _play_operations(self.engine, self.setup)
        gc.freeze()  # what was loaded before is here to stay: collections need not walk it again and again
        try:
            if progress is not None:
                progress(0)
            for left in play:
                if progress is not None:
                    progress(left)
        except KeyboardInterrupt:
            return False
        finally:
            gc.unfreeze()
        return True

    def outcome(self) -> Outcome:
        """What has been recorded so far."""
        return Outcome(
            setup=self.setup,
            trace=self.trace,
            engine=self.engine,
            prefixes=self.prefixes,
        )


def _play_operations(engine: Engine, setup: Setup) -> Generator[int, None, None]:
    """The op fidelity, which few ask for."""
    from kvsim.run.op.fidelity import play_operations

    return play_operations(engine, setup)


def _play_steps(engine: Engine) -> Generator[int, None, None]:
    """The step fidelity: the loop keeps the time; says how many requests have left, now and then."""
    while engine.play(TURNS_AT_ONCE):
        yield engine.left
    yield engine.left
