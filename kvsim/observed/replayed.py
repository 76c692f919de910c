"""Recorded requests, simulated under some constants: what TTFT and TPOT each of them would have had."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from kvsim.observed.records import Records
from kvsim.run.simulate import simulate
from kvsim.scenario.setup import Setup
from traces import Trace
from traces.schema import Floats

CONSTANTS = ("kernel_slowdown", "iteration_overhead_s", "request_overhead_s")
"""Fields of a `Setup` that records may fit, in the order of arrays below."""

EVERY = 3
"""Of so many requests in a row the last is held out: no fit sees it."""

_MOST_UNSERVED = 0.05  # of the recorded requests, beyond which the fleet is not the one that was measured


_COPIES, _MOST_COPIED = 8, 8000
"""How often records are replayed, one copy after the other, and the most requests that this may come to."""

_RUNS = 80  # simulations that a fit takes, about
_DRAINED = 3.0  # so many times as long as the longest answer took, a copy waits for the one before


class Latencies(NamedTuple):
    """Of each recorded request, (copies, requests); NaN where there is none. The first copy is as recorded."""

    ttft_s: Floats
    tpot_s: Floats


class Replayed:
    """Simulations of the recorded requests on the fleet of a setup, counted; equal constants are simulated once.

    Whether a prompt just catches an iteration or waits for the next one is chance: beside the records as they are,
    copies are simulated whose requests arrive up to a mean time between tokens later.

    What records say nothing of is left out of the setup: prefix caches, sessions, tenants, timeouts. `stated` are
    constants that the user gave, which stay.
    """

    def __init__(
        self,
        records: Records,
        setup: Setup,
        stated: Mapping[str, float],
        progress: Callable[[int], None] = lambda _ended: None,
    ) -> None:
        self.records, self.stated = records, dict(stated)
        self._setup, self._progress = _of_records(setup), progress
        self._order, self._trace = _copies(records)
        self._found: dict[tuple[float, ...], Latencies] = {}

    @property
    def simulations(self) -> int:
        """How many were made."""
        return len(self._found)

    def under(self, constants: Mapping[str, float]) -> Latencies:
        """The latencies under these constants; ValueError where the fleet does not serve what was served."""
        chosen = {**constants, **self.stated}
        key = tuple(chosen[name] for name in CONSTANTS)
        if key not in self._found:
            self._found[key] = self._simulated(chosen)
            self._progress(self.simulations)
        return self._found[key]

    def _simulated(self, constants: Mapping[str, float]) -> Latencies:
        changed: dict[str, Any] = dict(constants)
        result = simulate(self._trace, replace(self._setup, **changed), runs=_RUNS)
        if result.partial:
            raise KeyboardInterrupt
        columns = result.requests
        first_s, finish_s, output = (columns[name] for name in ("first_token_s", "finish_s", "output_tokens"))
        unserved = int(np.isnan(finish_s).sum())
        if unserved > _MOST_UNSERVED * len(finish_s):
            raise ValueError(
                f"{self.records.source}: the simulated fleet rejects {unserved / len(finish_s):.0%} of the requests "
                "that were served: state the fleet that was measured (gpus, tp, kv_cache_tokens)"
            )
        later = np.where(output > 1, output - 1, np.nan)
        return Latencies(self._back(first_s - columns["arrival_s"]), self._back((finish_s - first_s) / later))

    def _back(self, values: Floats) -> Floats:
        """By copy and request."""
        found = np.empty(len(values))
        found[self._order] = values
        return found.reshape(-1, len(self.records))


def held_out(requests: int) -> np.ndarray:
    """Which requests no fit sees, in the order of sending."""
    return np.asarray(np.arange(requests) % EVERY == EVERY - 1)


def _copies(records: Records) -> tuple[np.ndarray, Trace]:
    """The records, again and again with jitter, as one trace; for each of its requests which one it is."""
    trace, n = records.trace, len(records)
    copies = max(1, min(_COPIES, _MOST_COPIED // n))
    rng = np.random.default_rng(0)
    took_s = records.ttft_s + np.nan_to_num(records.tpot_s) * (trace.output_tokens - 1)
    seen_s = records.tpot_s[~held_out(n) & np.isfinite(records.tpot_s)]
    between_s = float(np.median(seen_s)) if len(seen_s) else 0.0
    period_s = float(trace.arrival_s[-1]) + _DRAINED * float(took_s.max()) + 1.0
    jitter_s = rng.uniform(0, between_s, (copies, n)) * (np.arange(copies) > 0)[:, None]
    arrival_s = (trace.arrival_s + jitter_s + period_s * np.arange(copies)[:, None]).ravel()
    order = np.argsort(arrival_s, kind="stable")
    copied = Trace.from_columns(
        name=trace.name,
        arrival_s=arrival_s[order],
        prompt_tokens=np.tile(trace.prompt_tokens, copies)[order],
        output_tokens=np.tile(trace.output_tokens, copies)[order],
    )
    return order, copied


def _of_records(setup: Setup) -> Setup:
    caches: dict[str, Any] = {f"prefix_cache_{name}_bytes": 0 for name in setup.prefix_cache_bytes}
    return replace(
        setup,
        **caches,
        prefix_cache_prefetch=False,
        prefix_cache_eviction="lru",
        prefix_cache_write="through",
        prefix_cache_sharing="tenant",
        prefix_cache_reuse="always",
        prefix_cache_quota=None,
        router=setup.router if not any(setup.prefix_cache_bytes.values()) else "least-loaded",
        sessions="open",
        session_kv="recompute",
        tenants={},
        slo_classes={},
        timeout_s=None,
        perfetto=None,
    )
