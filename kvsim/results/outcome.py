"""What a cluster recorded while it replayed a trace, gathered into a `Result`."""

import platform
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kvsim.engine.caches.state import SLOW, TIER_NAMES
from kvsim.engine.caches.tiers import PrefixTiers
from kvsim.engine.desk import Engine
from kvsim.engine.state.cluster import NOBODY, REJECTED, TIMED_OUT
from kvsim.hardware.machine import CPU, D2H, DOWN, H2D, NVLINK, UP
from kvsim.iteration.busy import HBM_BUSY, WORK
from kvsim.plans.derive import LINKS, TIERS
from kvsim.plans.guessing import guesser_of
from kvsim.results.causes import columns
from kvsim.results.curves import peak_and_mean
from kvsim.results.fairness import Tenancy
from kvsim.results.identity import digest
from kvsim.results.summary import Array, Result
from kvsim.results.token_gaps import TenantGaps, expanded
from kvsim.results.truth import limits_of
from kvsim.scenario.setup import Setup
from kvsim.scenario.tenants import terms_of
from kvsim.version import __version__
from policies import describe
from traces import Trace

TRAFFIC_CAUSES = ("plans", "weights", "swaps", "prefix", "collectives", "handoff")
PEER, NIC = "gpu->gpu", "nic"
OFFLOADS, LOADS = "hbm->ddr", "ddr->hbm"
BOOKS = (  # what replicas record beside the bytes of plans
    ("hbm->sm", "weights", "weight_bytes"),
    (LOADS, "swaps", "swap_up_bytes"),
    (OFFLOADS, "swaps", "swap_down_bytes"),
    (LOADS, "prefix", "prefix_up_bytes"),
    (OFFLOADS, "prefix", "prefix_down_bytes"),
    (PEER, "collectives", "collective_bytes"),
    (PEER, "handoff", "handoff_peer_bytes"),
    (NIC, "handoff", "handoff_nic_bytes"),
    (PEER, "activations", "activation_peer_bytes"),
    (NIC, "activations", "activation_nic_bytes"),
)
TURNS = {  # what became of states of sessions
    "kept": "turns_kept",
    "swapped": "turns_swapped",
    "dropped": "turns_dropped",
    "evicted": "states_evicted",
    "resumed": "turns_resumed",
}
TRACE_COLUMNS = (  # what a replay depends on, whatever the trace is called
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "tenant",
    "tenants",
    "session",
    "think_s",
    "block_tokens",
    "block_ids",
    "block_offsets",
)
MEMORY = ("hbm_bytes", "ddr_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The records of one run: what became of each request and each replica, and the prefix caches."""

    setup: Setup
    trace: Trace
    engine: Engine
    prefixes: PrefixTiers

    def result(self, *, wall_s: float, cpu_s: float, setup_cpu_s: float) -> Result:
        """Everything that was recorded, and the three times that the simulator itself took."""
        # What the engine hands over is freed as soon as it has been turned into columns.
        series = self.engine.take_notes()
        gaps = self.engine.take_gaps()
        several, token_gaps = len(self.trace.tenants) > 1, expanded(gaps)
        requests = self._columns(self.engine.take_requests())
        start_s = float(self.trace.arrival_s[0])
        # Until nobody runs: what has timed out may keep an iteration busy after the last token that anyone gets.
        makespan_s = float(np.max(series["time_s"], where=series["running"].astype(bool), initial=start_s)) - start_s
        traffic = self._traffic()
        memory = self._memory(series, start_s, start_s + makespan_s) | self._slow_memory(start_s, makespan_s)
        replicas = self.engine.cluster.replicas
        return Result(
            inputs=_inputs(self.trace, self.setup),
            requests=requests,
            preempted=_away(self.engine.take_aways()),
            operations=None if self.engine.timeline is None else self.engine.timeline.columns(),
            token_gaps=token_gaps,
            tenant_gaps=TenantGaps(gaps, self.trace.tenants) if several else None,
            series=self._series(series),
            memory=memory,
            links=self._links(traffic, makespan_s) | self._slow_links(makespan_s),
            traffic=traffic | self._slow_traffic(),
            cache=self._cache(),
            swaps={
                "count": int(replicas["swaps"].sum()),
                "bytes": sum(traffic[link]["swaps"] for link in (LOADS, OFFLOADS)),
            },
            recomputed={
                "count": int(replicas["recomputations"].sum()),
                "tokens": int(replicas["anew_tokens"].sum()),
            },
            busy=self._busy(makespan_s),
            limits=limits_of(self.setup),
            makespan_s=makespan_s,
            wall_s=wall_s,
            cpu_s=cpu_s,
            setup_cpu_s=setup_cpu_s,
            tenancy=self._tenancy(),
            speculation=self._speculation(requests, int(token_gaps[1].sum())),
            session_kv={name: int(replicas[column].sum()) for name, column in TURNS.items()},
        )

    def _speculation(self, requests: dict[str, Array], steps: int) -> dict[str, float] | None:
        """`steps` are those of single sequences; each is one wait for tokens."""
        guesser = guesser_of(self.setup)
        if guesser is None:
            return None
        later = requests["output_tokens"][requests["status"] == "finished"] - 1
        tp = self.setup.tp
        return {
            "tokens_per_step": guesser.speculation.tokens_per_step,
            "emitted_per_step": int(later.sum()) / steps if steps else 0.0,
            "steps": steps,
            "draft_weight_bytes": tp * guesser.weight_bytes,
            "draft_kv_bytes_per_token": tp * guesser.kv_bytes_per_token,
        }

    def _tenancy(self) -> Tenancy:
        setup, names, records = self.setup, self.trace.tenants, self.engine.cluster.tenants
        peaks = (setup.tp * records["peak_bytes"].max(axis=0)).tolist()
        return Tenancy(
            terms=dict(zip(names, terms_of(setup.tenants, names), strict=True)),
            slo_classes=setup.slo_classes,
            prompt_token_weight=setup.prompt_token_weight,
            output_token_weight=setup.output_token_weight,
            kv_peak_bytes=dict(zip(names, peaks, strict=True)) if len(peaks) == len(names) else {},
        )

    def _columns(self, requests: Array) -> dict[str, Array]:
        trace = self.trace
        finish_s = requests["finish_s"].copy()
        prompts_at = {"prefill_replica": _prefill_replica(requests)} if self.setup.prefill_gpus else {}
        left, ended = requests["rejected"], np.where(np.isnan(finish_s), "unfinished", "finished")
        timed_out_s = {"timed_out_s": _timed_out_s(requests, self.engine.cluster.patience)}
        return {
            "request": np.arange(len(requests)),
            "tenant": np.array(trace.tenants, dtype=object)[trace.tenant],
            "session": trace.session,
            "replica": requests["replica"].copy(),
            **prompts_at,
            "arrival_s": self._arrival_s(requests),
            "admitted_s": requests["admitted_s"].copy(),
            "first_token_s": requests["first_token_s"].copy(),
            "finish_s": finish_s,
            "prompt_tokens": trace.prompt_tokens,
            "cached_tokens": requests["cached_tokens"].copy(),
            "output_tokens": trace.output_tokens,
            "preemptions": requests["preemptions"].copy(),
            "status": np.select([left == REJECTED, left == TIMED_OUT], ["rejected", "timed_out"], ended),
            **(timed_out_s if len(self.engine.cluster.patience) else {}),
            **columns(requests),
        }

    def _arrival_s(self, requests: Array) -> Array:
        """When clients sent their requests: before the scheduler heard of them."""
        sent_s = requests["arrival_s"] - self.setup.request_overhead_s
        return np.where(requests["leader"] == NOBODY, self.trace.arrival_s, sent_s)

    def _traffic(self) -> dict[str, dict[str, int]]:
        """Bytes of all ranks by link and cause."""
        replicas, tp = self.engine.cluster.replicas, self.setup.tp
        setup = self.setup
        links = (*LINKS, PEER, NIC) if setup.prefill_gpus or setup.stages.hosts[-1] else (*LINKS, PEER)
        traffic = {link: dict.fromkeys(self._causes, 0) for link in links}
        for link, nbytes in zip(LINKS, replicas["plan_bytes"].sum(axis=0).tolist(), strict=True):
            traffic[link]["plans"] = tp * nbytes
        for link, cause, column in BOOKS:
            if cause in traffic.get(link, ()):
                traffic[link][cause] = tp * int(replicas[column].sum())
        return traffic

    @property
    def _causes(self) -> tuple[str, ...]:
        return TRAFFIC_CAUSES if self.setup.pp == 1 else (*TRAFFIC_CAUSES, "activations")

    def _busy(self, makespan_s: float) -> dict[str, float]:
        busy_s = self.engine.cluster.replicas["busy_s"].sum(axis=0)
        busy = busy_s / (makespan_s * self.setup.replicas * self.setup.pp or 1.0)
        return {
            "compute": float(busy[WORK]),
            "hbm": float(busy[HBM_BUSY]),
            "pcie_up": float(busy[H2D]),
            "pcie_down": float(busy[D2H]),
            "cpu": float(busy[CPU]),
            "nvlink": float(busy[NVLINK]),
        }

    def _links(self, traffic: dict[str, dict[str, int]], makespan_s: float) -> dict[str, dict[str, float]]:
        lanes = {"hbm->sm": HBM_BUSY, "ddr->cpu": CPU, LOADS: H2D, OFFLOADS: D2H, PEER: NVLINK}
        replicas = self.engine.cluster.replicas
        background_s = dict(zip((LOADS, OFFLOADS), replicas["background_s"].sum(axis=0).tolist(), strict=True))
        background_s[NIC] = float(replicas["nic_s"].sum())
        links = {}
        for link, causes in traffic.items():
            busy_s = background_s.get(link, 0.0)
            if link in lanes:
                busy_s += float(replicas["busy_s"][:, lanes[link]].sum())
            links[link] = {
                "bytes": sum(causes.values()),
                "busy_s": busy_s * self.setup.tp,
                "utilization": busy_s / (makespan_s * self.setup.replicas * self.setup.pp) if makespan_s else 0.0,
            }
        return links

    @property
    def _slow(self) -> list[str]:
        """The tiers below DDR that are on."""
        sizes = self.setup.prefix_cache_bytes
        return [name for name in TIER_NAMES[SLOW:] if sizes[name]]

    def _slow_ways(self) -> dict[str, Array]:
        """The links to tiers below DDR, of all hosts."""
        up = {f"{name}->ddr": self.prefixes.links(name, UP) for name in self._slow}
        return up | {f"ddr->{name}": self.prefixes.links(name, DOWN) for name in self._slow}

    def _slow_traffic(self) -> dict[str, dict[str, int]]:
        moved = {name: int(links["moved_bytes"].sum()) for name, links in self._slow_ways().items()}
        return {name: dict.fromkeys(TRAFFIC_CAUSES, 0) | {"prefix": nbytes} for name, nbytes in moved.items()}

    def _slow_links(self, makespan_s: float) -> dict[str, dict[str, float]]:
        rows = {}
        for name, links in self._slow_ways().items():
            shares = self.prefixes.host_shares
            hosts = len(links) * len(shares)
            busy_s = sum(links["busy_s"].tolist()) / max(shares)  # counted are the busiest hosts
            rows[name] = {
                "bytes": int(links["moved_bytes"].sum()),
                "busy_s": busy_s,
                "utilization": busy_s / (makespan_s * hosts) if makespan_s and hosts else 0.0,
            }
        return rows

    def _slow_memory(self, start_s: float, makespan_s: float) -> dict[str, dict[str, float]]:
        """The drives of each host, and the pool, where prefixes are cached in them."""
        setup, memory = self.setup, {}
        sizes = {"nvme": setup.host.nvme_bytes, "remote": setup.prefix_cache_remote_bytes}
        for name in self._slow:
            shares = self.prefixes.host_shares if name == "nvme" else [1.0]
            for index, (peak_bytes, byte_s) in enumerate(self.prefixes.held(name, start_s + makespan_s)):
                for host, share in enumerate(shares, index * len(shares)):
                    memory[f"host{host}.{name}" if name == "nvme" else name] = {
                        "capacity_bytes": sizes[name],
                        "peak_bytes": round(share * peak_bytes),
                        "mean_bytes": share * byte_s / makespan_s if makespan_s else 0.0,
                    }
        return memory

    def _cache(self) -> dict[str, dict[str, int]]:
        return {
            name: {
                "lookup_blocks": int(self.prefixes.tiers(name)["lookup_blocks"].sum()),
                "hit_blocks": int(self.prefixes.tiers(name)["hit_blocks"].sum()),
            }
            | self._prefetched(name)
            for name in (*TIER_NAMES[:SLOW], *self._slow)
        }

    def _prefetched(self, name: str) -> dict[str, int]:
        if not (self.setup.prefix_cache_prefetch and name in self._slow):
            return {}
        return {"prefetched_blocks": int(self.prefixes.tiers(name)["prefetched_blocks"].sum())}

    def _series(self, notes: dict[str, Array]) -> dict[str, Array]:
        """The notes as results have them, in the same memory."""
        series = {name: notes[name] for name in ("time_s", "replica", *MEMORY, "running", "waiting")}
        series["hbm_bytes"] += sum(self.setup.weight_bytes)
        for name in MEMORY:
            series[name] *= self.setup.tp
        return series

    def _memory(self, notes: dict[str, Array], start_s: float, end_s: float) -> dict[str, dict[str, float]]:
        setup, memory = self.setup, {}
        tp, pp, per_host = setup.tp, setup.pp, setup.replicas_per_host
        hbm_shares, ddr_shares = (setup.held_shares(tier) for tier in TIERS[:2])
        ends = np.cumsum(np.bincount(notes["replica"], minlength=setup.replicas)).tolist()
        own = [slice(*rows) for rows in pairwise([0, *ends])]
        for index, rows in enumerate(own):
            peak, mean = peak_and_mean([(notes["time_s"][rows], notes["hbm_bytes"][rows])], start_s, end_s)
            for stage, (weight_bytes, share) in enumerate(zip(setup.weight_bytes, hbm_shares, strict=True)):
                for gpu in range((index * pp + stage) * tp, (index * pp + stage + 1) * tp):
                    memory[f"gpu{gpu}.hbm"] = {
                        "capacity_bytes": setup.gpu.memory_bytes,
                        "peak_bytes": round(share * peak) + weight_bytes,
                        "mean_bytes": share * mean + weight_bytes,
                    }
        hosts = setup.stages.hosts
        for first in range(0, setup.replicas, per_host):
            curves = [(notes["time_s"][rows], notes["ddr_bytes"][rows]) for rows in own[first : first + per_host]]
            peak, mean = peak_and_mean(curves, start_s, end_s)
            for host in range(hosts[-1] + 1):  # of one replica, where it fills several
                share = sum(part for part, where in zip(ddr_shares, hosts, strict=True) if where == host)
                memory[f"host{first // per_host * (hosts[-1] + 1) + host}.ddr"] = {
                    "capacity_bytes": setup.host.ddr_bytes,
                    "peak_bytes": round(share * peak * tp),
                    "mean_bytes": share * mean * tp,
                }
        return memory


def _away(rows: Array) -> dict[str, Array]:
    return {name: rows[name].copy() for name in ("request", "from_s", "to_s")}


def _timed_out_s(requests: Array, patience: Array) -> Array:
    """When requests left because their first token had not come, NaN for the others."""
    gone = requests["rejected"] == TIMED_OUT
    timed_out_s = np.full(len(requests), np.nan)
    timed_out_s[gone] = requests["arrival_s"][gone] + patience["timeout_s"][requests["patience"][gone]]
    return timed_out_s


def _prefill_replica(requests: Array) -> Array:
    """Where each prompt was processed; a request that decodes nowhere else has that in `replica`."""
    return np.where(requests["sender"] == NOBODY, requests["replica"], requests["sender"])


def _model_notes(setup: Setup) -> list[str]:
    """What to know of how the model is spread over a replica's GPUs."""
    layers = setup.model.layers
    if setup.tp == 1 or not any(layer.experts for layer in layers):
        return []
    latents = " and the whole latent of every sequence" if any(layer.kind == "mla" for layer in layers) else ""
    words = (
        f"each of {setup.tp} ranks holds a slice of every expert{latents}; expert parallelism and data-parallel "
        "attention, with which engines serve such models at scale, are not modelled"
    )
    return [words]


def _kv_capacity(setup: Setup) -> dict[str, Any]:
    """Room for KV in the HBM of one replica, all its GPUs together, and where that figure is from."""
    found = setup.gpu_memory.capacity()
    return {
        "bytes": setup.tp * found.hbm_bytes,
        "tokens": found.tokens,
        "source": found.source,
        "reserve_bytes": setup.reserve,
    }


def _inputs(trace: Trace, setup: Setup) -> dict[str, Any]:
    options = {name: getattr(setup, name) for name in setup.__slots__ if name not in ("model", "policy", "gpu", "host")}
    if setup.speculation is not None:
        options["speculation"] = setup.speculation.described()
    options["tenants"] = {name: asdict(terms) for name, terms in setup.tenants.items()}
    return {
        "trace": trace.name,
        "trace_sha256": digest([getattr(trace, name) for name in TRACE_COLUMNS]),
        "setup_sha256": digest(setup),
        "trace_notes": list(trace.notes),
        "model_notes": _model_notes(setup),
        "skipped_rows": trace.skipped_rows,
        "requests": len(trace),
        "model": setup.model.name,
        "params": setup.model.params,
        "params_source": setup.model.source,
        "policy": describe(setup.policy),
        "gpu": setup.gpu.name,
        "parameter_set": setup.gpu.parameter_set,
        "host": setup.host.name,
        **options,
        "kv_dtype": setup.model.kv_dtype,
        "weight_dtype": setup.model.weight_dtype,
        "capacity_bytes": dict(zip((str(t) for t in TIERS), setup.capacity(), strict=True)),
        "kv_capacity": _kv_capacity(setup),
        "versions": {"kvsim": __version__, "python": platform.python_version(), "numpy": np.__version__},
    }
