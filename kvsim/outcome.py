"""What a cluster recorded while it replayed a trace, gathered into a `Result`."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsim.curves import Curve, peak_and_mean
from kvsim.derive import TIERS
from kvsim.ledger import CAUSES, DOWN, PEER, UP, Ledger
from kvsim.machine import CPU, D2H, H2D, NVLINK
from kvsim.makespan import HBM, WORK
from kvsim.prefix_cache import LruTier
from kvsim.results import Array, Result
from kvsim.sequence import Sequence as Request
from kvsim.setup import Setup
from kvsim.version import __version__
from policies import describe
from traces import Trace

HBM_BYTES, DDR_BYTES = 1, 2  # columns of a ledger's series


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The records of one run: what became of each request, a ledger per replica, the tiers of the prefix caches."""

    setup: Setup
    trace: Trace
    requests: Sequence[Request]
    replica_of: Array  # for each request
    ledgers: Sequence[Ledger]
    tiers: Mapping[str, Sequence[LruTier]]

    def result(self, *, wall_s: float, cpu_s: float, setup_cpu_s: float) -> Result:
        """Everything that was recorded, and the three times that the simulator itself took."""
        columns = self._columns()
        ends = np.concatenate([columns["finish_s"], columns["first_token_s"]])
        start_s = float(self.trace.arrival_s[0])
        makespan_s = float(np.max(ends, where=~np.isnan(ends), initial=start_s)) - start_s
        gaps, counts = zip(*(ledger.token_gaps() for ledger in self.ledgers), strict=True)
        tp = self.setup.tp
        traffic = {
            link: {cause: tp * sum(ledger.traffic[link][cause] for ledger in self.ledgers) for cause in CAUSES}
            for link in self.ledgers[0].traffic
        }
        return Result(
            inputs=_inputs(self.trace, self.setup),
            requests=columns,
            token_gaps=(np.concatenate(gaps), np.concatenate(counts)),
            series=self._series(),
            memory=self._memory(start_s, start_s + makespan_s),
            links=self._links(traffic, makespan_s),
            traffic=traffic,
            cache={
                name: {
                    "lookup_blocks": sum(tier.lookup_blocks for tier in tiers),
                    "hit_blocks": sum(tier.hit_blocks for tier in tiers),
                }
                for name, tiers in self.tiers.items()
            },
            swaps={
                "count": sum(ledger.swaps for ledger in self.ledgers),
                "bytes": tp * sum(ledger.swapped_bytes for ledger in self.ledgers),
            },
            busy=self._busy(makespan_s),
            makespan_s=makespan_s,
            wall_s=wall_s,
            cpu_s=cpu_s,
            setup_cpu_s=setup_cpu_s,
        )

    def _columns(self) -> dict[str, Array]:
        trace = self.trace

        def of(name: str, dtype: type) -> Array:
            return np.array([getattr(request, name) for request in self.requests], dtype=dtype)

        finish_s = of("finish_s", float)
        unless_rejected = np.where(np.isnan(finish_s), "unfinished", "finished")
        return {
            "request": np.arange(len(self.requests)),
            "tenant": np.array(trace.tenants, dtype=object)[trace.tenant],
            "session": trace.session,
            "replica": self.replica_of,
            "arrival_s": trace.arrival_s,
            "admitted_s": of("admitted_s", float),
            "first_token_s": of("first_token_s", float),
            "finish_s": finish_s,
            "prompt_tokens": trace.prompt_tokens,
            "cached_tokens": of("cached_tokens", int),
            "output_tokens": trace.output_tokens,
            "preemptions": of("preemptions", int),
            "status": np.where(of("rejected", bool), "rejected", unless_rejected),
        }

    def _busy(self, makespan_s: float) -> dict[str, float]:
        busy = np.sum([ledger.busy for ledger in self.ledgers], axis=0) / (makespan_s * self.setup.replicas or 1.0)
        return {
            "compute": float(busy[WORK]),
            "hbm": float(busy[HBM]),
            "pcie": float(max(busy[H2D], busy[D2H])),
            "cpu": float(busy[CPU]),
            "nvlink": float(busy[NVLINK]),
        }

    def _links(self, traffic: dict[str, dict[str, int]], makespan_s: float) -> dict[str, dict[str, float]]:
        lanes = {"hbm->sm": HBM, "ddr->cpu": CPU, UP: H2D, DOWN: D2H, PEER: NVLINK}
        links = {}
        for link, causes in traffic.items():
            busy_s = sum(float(x.busy[lanes[link]]) + x.background_s.get(link, 0.0) for x in self.ledgers)
            links[link] = {
                "bytes": sum(causes.values()),
                "busy_s": busy_s * self.setup.tp,
                "utilization": busy_s / (makespan_s * self.setup.replicas) if makespan_s else 0.0,
            }
        return links

    def _series(self) -> dict[str, Array]:
        rows = [(t, i, *rest) for i, ledger in enumerate(self.ledgers) for t, *rest in ledger.series]
        names = ("time_s", "replica", "hbm_bytes", "ddr_bytes", "running", "waiting")
        series = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        for name in ("hbm_bytes", "ddr_bytes"):
            series[name] *= self.setup.tp
        return series

    def _memory(self, start_s: float, end_s: float) -> dict[str, dict[str, float]]:
        setup, memory = self.setup, {}
        tp, per_host = setup.tp, setup.replicas_per_host
        for index, ledger in enumerate(self.ledgers):
            peak, mean = peak_and_mean([_curve(ledger, HBM_BYTES)], start_s, end_s)
            for gpu in range(index * tp, (index + 1) * tp):
                memory[f"gpu{gpu}.hbm"] = {
                    "capacity_bytes": setup.gpu.memory_bytes,
                    "peak_bytes": peak,
                    "mean_bytes": mean,
                }
        for host, first in enumerate(range(0, len(self.ledgers), per_host)):
            curves = [_curve(ledger, DDR_BYTES) for ledger in self.ledgers[first : first + per_host]]
            peak, mean = peak_and_mean(curves, start_s, end_s)
            memory[f"host{host}.ddr"] = {
                "capacity_bytes": setup.host.ddr_bytes,
                "peak_bytes": peak * tp,
                "mean_bytes": mean * tp,
            }
        return memory


def _curve(ledger: Ledger, column: int) -> Curve:
    rows = ledger.series
    return np.array([row[0] for row in rows]), np.array([row[column] for row in rows], dtype=np.float64)


def _inputs(trace: Trace, setup: Setup) -> dict[str, Any]:
    options = {name: getattr(setup, name) for name in setup.__slots__ if name not in ("model", "policy", "gpu", "host")}
    return {
        "trace": trace.name,
        "trace_notes": list(trace.notes),
        "skipped_rows": trace.skipped_rows,
        "requests": len(trace),
        "model": setup.model.name,
        "policy": describe(setup.policy),
        "gpu": setup.gpu.name,
        "parameter_set": setup.gpu.parameter_set,
        "host": setup.host.name,
        **options,
        "kv_dtype": setup.model.kv_dtype,
        "weight_dtype": setup.model.weight_dtype,
        "capacity_bytes": dict(zip((str(t) for t in TIERS), setup.capacity(), strict=True)),
        "versions": {"kvsim": __version__, "python": platform.python_version(), "numpy": np.__version__},
    }
