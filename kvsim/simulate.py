"""One simulation: a trace, a model, a policy, a cluster, and what came of it."""

import platform
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from kvsim.derive import TIERS, PlanTable
from kvsim.hardware import Gpu, Host
from kvsim.ledger import CAUSES, DOWN, PEER, UP, Ledger
from kvsim.machine import CPU, D2H, H2D, NVLINK, Machine
from kvsim.makespan import HBM, WORK, Clock
from kvsim.names import unknown_name
from kvsim.neighbours import Neighbours
from kvsim.op_fidelity import Node
from kvsim.prefix_cache import LruTier, PrefixCache
from kvsim.replica import Limits, Replica
from kvsim.results import Array, Result
from kvsim.sequence import Sequence as Request
from kvsim.units import format_bytes
from kvsim.version import __version__
from policies import ModelShape, Policy, Reuse, Step, describe, plan_layer, reuse_of
from policies.plan import stored_bytes
from traces import Trace

ROUTERS = ("round-robin", "least-loaded")
SCHEDULERS = ("fcfs",)
FIDELITIES = ("step", "op")
PREEMPTIONS = ("swap", "recompute")
HBM_BYTES, DDR_BYTES = 1, 2  # columns of a ledger's series


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Everything that a simulation of one policy depends on, besides the trace."""

    model: ModelShape
    policy: Policy
    gpu: Gpu
    host: Host
    gpus: int = 1
    tp: int = 1
    fidelity: str = "step"
    scheduler: str = "fcfs"
    router: str = "round-robin"
    preemption: str = "swap"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    gpu_memory_utilization: float = 0.9
    host_memory_utilization: float = 0.9
    prefix_cache_hbm_bytes: int = 0
    prefix_cache_ddr_bytes: int = 0
    counts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("gpus", "tp", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("prefix_cache_hbm_bytes", "prefix_cache_ddr_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("gpu_memory_utilization", "host_memory_utilization"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1")
        for name, known in (
            ("fidelity", FIDELITIES),
            ("scheduler", SCHEDULERS),
            ("router", ROUTERS),
            ("preemption", PREEMPTIONS),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        if self.gpus % self.tp:
            raise ValueError(f"gpus={self.gpus} is not a multiple of tp={self.tp}; every replica takes tp GPUs")
        if self.tp > self.host.gpus_max:
            raise ValueError(f"tp={self.tp} exceeds the {self.host.gpus_max} GPUs of host {self.host.name!r}")
        for name, share in self.counts.items():
            if not 0 <= share <= 1:
                raise ValueError(f"counts: {name}={share} must be a share from 0 to 1 of the count's maximum")

    @property
    def replicas(self) -> int:
        """Engine replicas, each of `tp` GPUs."""
        return self.gpus // self.tp

    @property
    def replicas_per_host(self) -> int:
        """Replicas that share one host, at the most."""
        return min(self.replicas, self.host.gpus_max // self.tp)

    @property
    def rank(self) -> ModelShape:
        """The model as one rank holds it."""
        return self.model.shard(self.tp) if self.tp > 1 else self.model

    @property
    def activation_bytes(self) -> int:
        """HBM for one iteration's activations and logits: the widest layer of the largest batch, at 16 and 32 bits."""
        rank = self.rank
        mlp_width = max(layer.mlp_active_params for layer in rank.layers) // (3 * rank.hidden_dim)
        token_bytes = 2 * (4 * rank.hidden_dim + 2 * mlp_width)
        logits_bytes = 4 * (rank.head_params // rank.hidden_dim) * self.max_num_seqs
        return self.max_num_batched_tokens * token_bytes + logits_bytes

    def machine(self) -> Machine:
        """One rank's place in its node."""
        return Machine(gpu=self.gpu, host=self.host, tp=self.tp)

    def capacity(self) -> tuple[int, int, int]:
        """Bytes per tier of one rank for KV state, after weights, activations and prefix caches.

        Raises ValueError when the model or a cache leaves nothing.
        """
        ranks = self.replicas_per_host * self.tp
        usable = int(self.gpu.memory_bytes * self.gpu_memory_utilization)
        weights, cached = self.rank.weight_bytes, self.prefix_cache_hbm_bytes // ranks
        hbm = usable - weights - self.activation_bytes - cached
        if hbm <= 0:
            parts = [("weights", weights), ("activations", self.activation_bytes), ("prefix cache", cached)]
            needs = " + ".join(f"{format_bytes(n)} {what}" for what, n in parts if n)
            raise ValueError(
                f"{self.model.name} does not fit: one of {self.tp} x {self.gpu.name} has {format_bytes(usable)} usable "
                f"(gpu_memory_utilization={self.gpu_memory_utilization}), needed: {needs}; raise --tp or that share"
            )
        ddr = (int(self.host.ddr_bytes * self.host_memory_utilization) - self.prefix_cache_ddr_bytes) // ranks
        if ddr < 0:
            raise ValueError(
                f"prefix_cache_ddr={format_bytes(self.prefix_cache_ddr_bytes)} exceeds the usable "
                f"{format_bytes(int(self.host.ddr_bytes * self.host_memory_utilization))} of host {self.host.name!r}"
            )
        return hbm, ddr, 0


def simulate(trace: Trace, setup: Setup, progress: Callable[[int], None] | None = None) -> Result:
    """Replay `trace` on a cluster; `progress` is told how many requests have left, now and then.

    An interruption (Ctrl-C) ends the replay early: requests that had not finished are reported as such.
    """
    began_s = time.perf_counter()
    env = simpy.Environment()
    cluster = _Cluster(env, trace, setup)
    env.process(cluster.arrivals())
    setup_cpu_s = time.process_time()
    cluster.play(progress)
    cpu_s = time.process_time() - setup_cpu_s
    return cluster.result(time.perf_counter() - began_s, cpu_s, setup_cpu_s)


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
        self.placed = np.zeros(len(trace), dtype=np.int64)
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
            if request.arrival_s > self.env.now:
                yield self.env.timeout(request.arrival_s - self.env.now)
            chosen = self._route(request.index)
            self.placed[request.index] = chosen
            self.replicas[chosen].submit(request)

    def _route(self, index: int) -> int:
        if self.setup.router == "round-robin":
            return index % len(self.replicas)
        return min(range(len(self.replicas)), key=lambda i: self.replicas[i].outstanding_tokens)

    def play(self, progress: Callable[[int], None] | None) -> None:
        """Run until nothing is left to happen."""
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

    def result(self, wall_s: float, cpu_s: float, setup_cpu_s: float) -> Result:
        """Everything that was recorded."""
        setup, trace = self.setup, self.trace
        columns = _columns(trace, self.requests, self.placed)
        ends = [t for name in ("finish_s", "first_token_s") for t in columns[name][~np.isnan(columns[name])]]
        makespan_s = float(max(ends) - trace.arrival_s[0]) if ends else 0.0
        gaps = [ledger.token_gaps() for ledger in self.ledgers]
        traffic = {
            link: {cause: setup.tp * sum(ledger.traffic[link][cause] for ledger in self.ledgers) for cause in CAUSES}
            for link in self.ledgers[0].traffic
        }
        links = self._links(traffic, makespan_s)
        busy = sum((ledger.busy for ledger in self.ledgers), np.zeros_like(self.ledgers[0].busy))
        elapsed_s = makespan_s * setup.replicas or 1.0
        return Result(
            inputs=_inputs(trace, setup),
            requests=columns,
            token_gaps=(np.concatenate([g for g, _ in gaps]), np.concatenate([n for _, n in gaps])),
            series=self._series(),
            memory=self._memory(makespan_s),
            links=links,
            traffic=traffic,
            cache=_cache_counts({"hbm": self.hbm_tiers, "ddr": self.ddr_tiers}),
            swaps={
                "count": sum(ledger.swaps for ledger in self.ledgers),
                "bytes": setup.tp * sum(ledger.swapped_bytes for ledger in self.ledgers),
            },
            busy={
                "compute": float(busy[WORK]) / elapsed_s,
                "hbm": float(busy[HBM]) / elapsed_s,
                "pcie": float(max(busy[H2D], busy[D2H])) / elapsed_s,
                "cpu": float(busy[CPU]) / elapsed_s,
                "nvlink": float(busy[NVLINK]) / elapsed_s,
            },
            makespan_s=makespan_s,
            wall_s=wall_s,
            cpu_s=cpu_s,
            setup_cpu_s=setup_cpu_s,
        )

    def _links(self, traffic: dict[str, dict[str, int]], makespan_s: float) -> dict[str, dict[str, float]]:
        lanes = {"hbm->sm": HBM, "ddr->cpu": CPU, UP: H2D, DOWN: D2H, PEER: NVLINK}
        links = {}
        for link, causes in traffic.items():
            busy_s = sum(float(x.busy[lanes[link]]) + x.background_s.get(link, 0.0) for x in self.ledgers)
            share = busy_s / (makespan_s * self.setup.replicas) if makespan_s else 0.0
            links[link] = {
                "bytes": sum(causes.values()),
                "busy_s": busy_s * self.setup.tp,
                "utilization": share,
            }
        return links

    def _series(self) -> dict[str, Array]:
        rows = [(t, i, *rest) for i, ledger in enumerate(self.ledgers) for t, *rest in ledger.series]
        names = ("time_s", "replica", "hbm_bytes", "ddr_bytes", "running", "waiting")
        if not rows:
            return {name: np.zeros(0) for name in names}
        series = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        for name in ("hbm_bytes", "ddr_bytes"):
            series[name] = series[name] * self.setup.tp
        return series

    def _memory(self, makespan_s: float) -> dict[str, dict[str, float]]:
        setup, memory = self.setup, {}
        tp, per_host = setup.tp, setup.replicas_per_host
        for index, ledger in enumerate(self.ledgers):
            peak, mean = _peak_and_mean([_curve(ledger, HBM_BYTES)], makespan_s)
            for gpu in range(index * tp, (index + 1) * tp):
                memory[f"gpu{gpu}.hbm"] = {
                    "capacity_bytes": setup.gpu.memory_bytes,
                    "peak_bytes": peak,
                    "mean_bytes": mean,
                }
        for host in range(len(self.ddr_tiers)):
            curves = [_curve(ledger, DDR_BYTES) for ledger in self.ledgers[host * per_host : (host + 1) * per_host]]
            peak, mean = _peak_and_mean(curves, makespan_s)
            memory[f"host{host}.ddr"] = {
                "capacity_bytes": setup.host.ddr_bytes,
                "peak_bytes": peak * tp,
                "mean_bytes": mean * tp,
            }
        return memory


def _token_bytes(setup: Setup) -> list[int]:
    """Bytes per tier that one rank keeps for each further token of a long prompt, staging aside."""
    kept = []
    for tokens in (1 << 20, 1 << 21):
        step = Step.decoding(tokens, 1)
        plans = [plan_layer(setup.policy, setup.rank, step, layer) for layer in range(setup.rank.n_layers)]
        stored = stored_bytes([[b for b in plan.buffers if not b.ring] for plan in plans])
        kept.append([stored[tier] for tier in TIERS])
    return [-(-(longer - long) // (1 << 20)) for long, longer in zip(*kept, strict=True)]


def _columns(trace: Trace, requests: Sequence[Request], placed: Array) -> dict[str, Any]:
    def of(name: str, dtype: type) -> Array:
        return np.array([getattr(r, name) for r in requests], dtype=dtype)

    finish_s = of("finish_s", float)
    status = np.where(of("rejected", bool), "rejected", np.where(np.isnan(finish_s), "unfinished", "finished"))
    return {
        "request": np.arange(len(requests)),
        "tenant": np.array(trace.tenants, dtype=object)[trace.tenant],
        "session": trace.session,
        "replica": placed,
        "arrival_s": trace.arrival_s,
        "admitted_s": of("admitted_s", float),
        "first_token_s": of("first_token_s", float),
        "finish_s": finish_s,
        "prompt_tokens": trace.prompt_tokens,
        "cached_tokens": of("cached_tokens", int),
        "output_tokens": trace.output_tokens,
        "preemptions": of("preemptions", int),
        "status": status,
    }


def _curve(ledger: Ledger, column: int) -> tuple[Array, Array]:
    rows = ledger.series
    return np.array([row[0] for row in rows]), np.array([row[column] for row in rows], dtype=np.float64)


def _peak_and_mean(curves: Sequence[tuple[Array, Array]], makespan_s: float) -> tuple[int, float]:
    """The largest value, and the mean over time, of the sum of curves that are linear between their points."""
    times = np.unique(np.concatenate([times for times, _ in curves]))
    if not len(times) or not makespan_s:
        return 0, 0.0
    total = np.zeros_like(times)
    for at, values in curves:
        if len(at):
            total += np.interp(times, at, values)
    span_s = times[-1] - times[0]
    return int(total.max()), float(np.trapezoid(total, times) / span_s if span_s else total[-1])


def _cache_counts(tiers: dict[str, list[LruTier]]) -> dict[str, dict[str, int]]:
    return {
        name: {"lookup_blocks": sum(t.lookup_blocks for t in of), "hit_blocks": sum(t.hit_blocks for t in of)}
        for name, of in tiers.items()
    }


def _inputs(trace: Trace, setup: Setup) -> dict[str, Any]:
    options = {
        name: getattr(setup, name)
        for name in setup.__slots__
        if name not in ("model", "policy", "gpu", "host") and not name.startswith("_")
    }
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
