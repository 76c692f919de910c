"""What a simulation of one policy depends on besides the trace: model, hardware, cluster and engine options."""

import math
from dataclasses import dataclass

from kvsim.hardware.catalogue import Gpu, Host
from kvsim.hardware.machine import Machine
from kvsim.scenario import choices, kinds
from kvsim.scenario.engine_memory import reserve
from kvsim.scenario.finite import first_nan
from kvsim.scenario.kv_capacity import BLOCK_TOKENS, GpuMemory, Stated
from kvsim.scenario.options import (
    CACHE,
    CLUSTER,
    ENGINE,
    MODEL,
    RESULTS,
    SESSIONS,
    TENANTS,
    check_options,
    option,
    options_of,
)
from kvsim.scenario.quotas import Quota, read_quota
from kvsim.scenario.speculation import Speculation
from kvsim.scenario.stages import Stages, fitting_bytes, held_shares, stages_of
from kvsim.scenario.tenants import Tenant, check_classes, check_pins, check_timeout
from kvsim.text.units import format_bytes
from policies import ModelShape, Policy
from policies.plan import Tier
from policies.shown import shown

MOST_OVERHEAD_S, MOST_SLOWDOWN = 60.0, 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Everything that a simulation of one policy depends on, besides the trace.

    There are `gpus` / (`tp` x `pp`) engine replicas. Sizes of prefix caches are per host, that of HBM over all its
    GPUs, and that of the remote pool for all hosts; 0 is off. `counts` replaces the default mean of a data-dependent
    count, as a share of its maximum. `tenants` are by name or pattern, `slo_classes` bound latencies as
    {"chat": {"ttft_s": 10}}, and the weights of tokens make up the service that `fair` shares out and results report.

    Raises ValueError for a figure out of its range, an unknown name, and replicas that no host holds.
    """

    model: ModelShape
    policy: Policy
    gpu: Gpu
    host: Host
    # More than these GPUs would outgrow the memory of the machine that simulates them.
    gpus: int = option(
        1, kinds.WHOLE.bounded(most=65_536), CLUSTER, "All GPUs; the replicas are gpus / (tp x pp).", least=1
    )
    tp: int = option(1, kinds.WHOLE, CLUSTER, "GPUs that share every layer of a replica.", least=1)
    pp: int = option(1, kinds.WHOLE, CLUSTER, "Stages of tp GPUs that layers are split into.", least=1)
    prefill_gpus: int = option(
        0, kinds.WHOLE.bounded(least=0), CLUSTER, "GPUs that only process prompts; the others decode. Default: none."
    )
    fidelity: str = option("step", kinds.choice(choices.FIDELITIES), ENGINE, "op: every operation, links shared.")
    scheduler: str = option("fcfs", kinds.choice(choices.SCHEDULERS), ENGINE, "Whose request is admitted next.")
    router: str = option(
        "round-robin",
        kinds.choice(choices.ROUTERS, "NAME"),
        ENGINE,
        "round-robin, least-loaded, prefix-affinity or kv-aware (Mooncake).",
    )
    preemption: str = option("swap", kinds.choice(choices.PREEMPTIONS), ENGINE, "When memory runs out.")
    sessions: str = option(
        "open", kinds.choice(choices.SESSIONS), SESSIONS, "closed: a session waits for its answers, then thinks."
    )
    session_kv: str = option(
        "recompute", kinds.choice(choices.SESSION_KVS), SESSIONS, "What becomes of a session's KV between turns."
    )
    max_num_seqs: int = option(256, kinds.WHOLE, ENGINE, "Sequences that run at a time.", least=1)
    max_num_batched_tokens: int = option(
        8192, kinds.NUMBER, ENGINE, "Tokens of an iteration, which bound the prefill chunk.", least=1
    )
    engine: str = option(
        "vllm", kinds.choice(choices.ENGINES), ENGINE, "Whose memory beside weights and KV is set aside."
    )
    gpu_memory_utilization: float = option(0.9, kinds.SHARE, ENGINE, "What an engine may use of HBM.")
    kv_cache_tokens: int | None = option(
        None, kinds.NUMBER, ENGINE, "KV of a replica, in tokens. Default: what HBM leaves.", least=1
    )
    kv_cache_blocks: int | None = option(None, kinds.WHOLE, ENGINE, "Or in blocks of --kv-cache-block-tokens.", least=1)
    kv_cache_block_tokens: int = option(BLOCK_TOKENS, kinds.WHOLE, ENGINE, "Tokens of such a block.", least=1)
    kv_cache_memory_bytes: int | None = option(None, kinds.SIZE, ENGINE, "Or in bytes of each GPU.", least=1)
    host_memory_utilization: float = option(0.9, kinds.SHARE, ENGINE, "What all engines of a host may use of DDR.")
    prefix_cache_hbm_bytes: int = option(0, kinds.SIZE, CACHE, "HBM of each host for cached prefixes. Default: none.")
    prefix_cache_ddr_bytes: int = option(0, kinds.SIZE, CACHE, "DDR of each host for cached prefixes. Default: none.")
    prefix_cache_nvme_bytes: int = option(0, kinds.SIZE, CACHE, "NVMe of each host for cached prefixes. Default: none.")
    prefix_cache_remote_bytes: int = option(0, kinds.SIZE, CACHE, "A pool of all hosts, over RDMA. Default: none.")
    prefix_cache_eviction: str = option(
        "lru",
        kinds.choice(choices.EVICTIONS, "NAME"),
        CACHE,
        choices.EVICTION_HELP,
    )
    prefix_cache_write: str = option(
        "through", kinds.choice(choices.WRITES), CACHE, "To every tier, or to the next one when evicted."
    )
    prefix_cache_sharing: str = option(
        "tenant", kinds.choice(choices.SHARINGS), CACHE, "Whose prompts hit a cached block: its tenant's alone, or all."
    )
    prefix_cache_reuse: str = option(
        "always", kinds.choice(choices.REUSES), CACHE, "cheaper: compute anew what would take longer to load."
    )
    prefix_cache_prefetch: bool = option(False, kinds.SWITCH, CACHE, "Fetch a waiting prompt's blocks up to DDR.")
    prefix_cache_quota: Quota = option(None, kinds.QUOTA, CACHE, "Of every tier, a tenant's own. Default: none.")
    counts: dict[str, float] = option(
        dict, kinds.COUNTS, MODEL, "What data decide, as shares of its maximum, or a recording."
    )
    tenants: dict[str, Tenant] = option(
        dict,
        kinds.TENANTS,
        TENANTS,
        "A tenant's weight, priority (larger first), slo_class, quota, replicas, timeout; NAME may hold *.",
        flag="tenant",
    )
    slo_classes: dict[str, dict[str, float]] = option(
        dict, kinds.CLASSES, TENANTS, "Bounds of the tenants of a class, in place of --slo.", flag="slo_class"
    )
    # The weights of arXiv:2401.00588.
    prompt_token_weight: float = option(1.0, kinds.FACTOR, TENANTS, "Service of a prompt's token, for scheduler fair.")
    output_token_weight: float = option(2.0, kinds.FACTOR, TENANTS, "Service of an output's token.")
    timeout_s: float | None = option(
        None, kinds.TIMEOUT, ENGINE, "Leave when the first token has not come by then. Default: never."
    )  # a tenant may have its own
    # What a running server has beside its kernels, as records of its clients tell (`kvsim.observed`).
    iteration_overhead_s: float = option(
        0.0, kinds.SECONDS, ENGINE, "Of the host in each iteration: scheduling, sampling, no kernels."
    )
    request_overhead_s: float = option(
        0.0, kinds.SECONDS, ENGINE, "Before a request reaches the scheduler: network, HTTP, tokenizer."
    )
    kernel_slowdown: float = option(1.0, kinds.FACTOR, ENGINE, "Kernels take X times as long as they are priced.")
    speculation: Speculation | None = None  # tokens guessed and verified in each decode step
    perfetto: tuple[float, float] | None = option(
        None, kinds.WINDOW, RESULTS, "Record every operation in this window, as 10s-10.5s."
    )

    def __post_init__(self) -> None:
        nan = first_nan(self)
        if nan is not None:
            raise ValueError(f"{nan}=nan is no number, and neither would be what is computed from it; state one")
        check_options(self)
        for name, size_bytes in self.prefix_cache_bytes.items():
            if size_bytes < 0:
                raise ValueError(f"prefix_cache_{name}_bytes={size_bytes} must not be negative")
        for name in ("gpu_memory_utilization", "host_memory_utilization"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1")
        self._stated_kv()
        if self.router in choices.CACHE_ROUTERS and not any(self.prefix_cache_bytes.values()):
            raise ValueError(
                f"router={self.router} looks into prefix caches, and there is none; give prefix_cache_hbm or "
                "prefix_cache_ddr a size, or use router=least-loaded"
            )
        if self.gpus % (self.tp * self.pp):
            what = f"tp={self.tp}" if self.pp == 1 else f"tp={self.tp} x pp={self.pp}"
            raise ValueError(f"gpus={self.gpus} is not a multiple of {what}; every replica takes so many GPUs")
        self._check_disaggregation()
        self._check_session_kv()
        if self.tp > self.host.gpus_max:
            raise ValueError(f"tp={self.tp} exceeds the {self.host.gpus_max} GPUs of host {shown(self.host.name)}")
        self._check_prefix_cache()
        self._check_speculation()
        if self.pp > 1:
            self._check_pipeline()
        for name in ("prompt_token_weight", "output_token_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number above 0")
        check_timeout(self.timeout_s)
        self._check_overheads()
        check_classes(self.tenants, self.slo_classes)
        check_pins(self.tenants, self.replicas)
        if self.perfetto is not None and not 0 <= self.perfetto[0] < self.perfetto[1] < math.inf:
            raise ValueError(f"perfetto={self.perfetto}: a window goes from one second to a later one, such as 10s-12s")
        for name, share in self.counts.items():
            if not 0 <= share <= 1:
                raise ValueError(f"counts: {name}={share} must be a share from 0 to 1 of the count's maximum")

    def _check_speculation(self) -> None:
        if self.speculation is None:
            return
        self.speculation.check(self.policy)
        for what, given in (
            ("prefill_gpus", self.prefill_gpus),
            ("a prefix cache", any(self.prefix_cache_bytes.values())),
        ):
            if self.speculation.draft is not None and given:
                raise ValueError(
                    f"speculate with a draft model and {what}: neither hands over nor caches the draft's own KV; leave "
                    "one out, or let draft=medusa, hidden-transfer or lookup guess"
                )

    def _check_prefix_cache(self) -> None:
        host, nvme_bytes = self.host, self.prefix_cache_nvme_bytes
        for one in options_of(Setup):
            name = one.name
            given = name.startswith("prefix_cache_") and getattr(self, name) != one.default
            if given and not any(self.prefix_cache_bytes.values()):
                raise ValueError(f"{name} needs a prefix cache: give prefix_cache_hbm, _ddr, _nvme or _remote a size")
        order = self.prefix_cache_eviction
        if choices.EVICTION_ORDERS[order].level == "next-use" and self.sessions == "closed":
            raise ValueError(
                f"prefix_cache_eviction={order} knows what comes next, which with sessions=closed depends on it; use "
                "sessions=open or another order"
            )
        if nvme_bytes > host.nvme_bytes:
            has = f"the {format_bytes(host.nvme_bytes)} of NVMe" if host.nvme_bytes else "the NVMe, which is none,"
            raise ValueError(f"prefix_cache_nvme={format_bytes(nvme_bytes)} exceeds {has} of host {shown(host.name)}")
        if self.prefix_cache_remote_bytes and not host.nic_Bps:
            raise ValueError(
                f"prefix_cache_remote needs a network, and host {shown(host.name)} has none (nic_Bps is 0); choose "
                "another --host or leave it out"
            )
        below = self.prefix_cache_nvme_bytes or self.prefix_cache_remote_bytes
        if self.prefix_cache_prefetch and not (below and self.prefix_cache_ddr_bytes):
            raise ValueError(
                "prefix_cache_prefetch brings blocks from prefix_cache_nvme or prefix_cache_remote up to "
                "prefix_cache_ddr; give both ends a size, or leave it out"
            )
        if read_quota(self.prefix_cache_quota) is not None and self.prefix_cache_sharing == "all":
            raise ValueError(
                "prefix_cache_quota gives tenants parts of their own, which prefix_cache_sharing=all denies; use one"
            )

    def _check_session_kv(self) -> None:
        caches = [f"prefix_cache_{name}" for name, size_bytes in self.prefix_cache_bytes.items() if size_bytes]
        others = ["prefill_gpus"] if self.prefill_gpus else caches
        if self.session_kv != "recompute" and others:
            raise ValueError(
                f"session_kv={self.session_kv} holds the state of a session where it was computed, which {others[0]} "
                "does in its own way; use one of them"
            )

    def _check_disaggregation(self) -> None:
        prefill, tp = self.prefill_gpus, self.tp
        if not 0 <= prefill < self.gpus or prefill % tp:
            raise ValueError(
                f"prefill_gpus={prefill} must be a multiple of tp={tp} from 0 to below gpus={self.gpus}; others decode"
            )
        limits = [name for name, one in self.tenants.items() if one.quota < 1 or one.replicas is not None]
        if prefill and (self.scheduler != "fcfs" or limits):
            what = (
                f"scheduler={self.scheduler}"
                if self.scheduler != "fcfs"
                else f"quota or replicas of {shown(limits[0])}"
            )
            raise ValueError(
                f"prefill_gpus={prefill} works with scheduler=fcfs and no limits to tenants, not with {what}"
            )
        if prefill and self.prefix_cache_hbm_bytes:
            raise ValueError(
                "prefix_cache_hbm would take memory of the GPUs that decode as well, which look nothing up; "
                "use prefix_cache_ddr with prefill_gpus"
            )
        if prefill and self.replicas > self.host.gpus_max // tp and not self.host.nic_Bps:
            raise ValueError(
                f"prefill_gpus={prefill}: host {shown(self.host.name)} has no network to hand state over to another "
                f"host; use at most its {self.host.gpus_max} GPUs, or a host whose nic_Bps is above 0"
            )

    def _check_overheads(self) -> None:
        for name in ("iteration_overhead_s", "request_overhead_s"):
            if not 0 <= getattr(self, name) <= MOST_OVERHEAD_S:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to {MOST_OVERHEAD_S:g} s")
        if not 1 / MOST_SLOWDOWN <= self.kernel_slowdown <= MOST_SLOWDOWN:
            raise ValueError(
                f"kernel_slowdown={self.kernel_slowdown} must be from {1 / MOST_SLOWDOWN:g} to {MOST_SLOWDOWN:g}; a "
                "GPU that is further from its prices than that is another one"
            )
        waits_s = [self.timeout_s, *(tenant.timeout_s for tenant in self.tenants.values())]
        if any(timeout_s is not None and timeout_s <= self.request_overhead_s for timeout_s in waits_s):
            raise ValueError(
                f"request_overhead={self.request_overhead_s:g}s is all of a timeout, so no request would be served; "
                "lower it or wait longer"
            )

    def _check_pipeline(self) -> None:
        others = {
            "prefill_gpus": self.prefill_gpus,
            "a draft model of speculate": self.speculation is not None and self.speculation.draft is not None,
        }
        if used := [name for name, given in others.items() if given]:
            raise ValueError(f"pp={self.pp} does not work with {' and '.join(used)} yet; use pp=1 or leave that out")
        stages_of(self.model, self.machine(), self.pp)

    @property
    def prefix_cache_bytes(self) -> dict[str, int]:
        """Sizes of the tiers for cached prefixes, of a host, and of the remote pool."""
        return {
            "hbm": self.prefix_cache_hbm_bytes,
            "ddr": self.prefix_cache_ddr_bytes,
            "nvme": self.prefix_cache_nvme_bytes,
            "remote": self.prefix_cache_remote_bytes,
        }

    @property
    def prefill_replicas(self) -> int:
        """Replicas that only process prompts, the first ones; 0 where every replica does both."""
        return self.prefill_gpus // self.tp

    @property
    def replicas(self) -> int:
        """Engine replicas, each of `tp` x `pp` GPUs."""
        return self.gpus // (self.tp * self.pp)

    @property
    def replicas_per_host(self) -> int:
        """Replicas that share one host, at the most; one where a replica fills several hosts."""
        return max(1, min(self.replicas, self.host.gpus_max // (self.tp * self.pp)))

    @property
    def gpus_on_host(self) -> int:
        """GPUs of a replica on one host, at the most."""
        return self.tp * min(self.pp, self.host.gpus_max // self.tp)

    @property
    def stages(self) -> Stages:
        """The pipeline of a replica; a single stage where there is none."""
        return stages_of(self.model, self.machine(), self.pp)

    def held_shares(self, tier: Tier) -> tuple[float, ...]:
        """Which part of a sequence's bytes in a tier each stage holds, at the most."""
        if self.pp == 1:
            return (1.0,)
        shares = held_shares(self.policy, self.rank, self.stages.layers, tier)
        # What is swapped out lies in DDR as it lay in HBM.
        return shares if any(shares) else held_shares(self.policy, self.rank, self.stages.layers, Tier.HBM)

    @property
    def rank(self) -> ModelShape:
        """The model as one rank holds it."""
        return self.model.shard(self.tp) if self.tp > 1 else self.model

    @property
    def step_tokens(self) -> int:
        """Tokens that a decode step of one sequence takes through the model."""
        return 1 if self.speculation is None else self.speculation.verified_tokens

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest iteration: a sequence that comes back needs but one of its own to be left."""
        return max(self.max_num_batched_tokens, self.max_num_seqs * self.step_tokens) + self.step_tokens - 1

    @property
    def draft_weight_bytes(self) -> int:
        """What guessing adds to the weights of a rank."""
        return 0 if self.speculation is None else self.speculation.weight_bytes(self.rank, self.tp)

    @property
    def weight_bytes(self) -> list[int]:
        """Of a GPU of each stage; what guesses stands where the head does, on the last."""
        weight_bytes = [rank.weight_bytes for rank in self.stages.ranks]
        weight_bytes[-1] += self.draft_weight_bytes
        return weight_bytes

    def machine(self) -> Machine:
        """One rank's place in its node."""
        return Machine(
            gpu=self.gpu,
            host=self.host,
            tp=self.tp,
            layer_overhead_s=self.iteration_overhead_s / self.model.n_layers,
            kernel_slowdown=self.kernel_slowdown,
        )

    @property
    def reserve(self) -> list[dict[str, int]]:
        """HBM of a GPU of each stage that neither weights nor KV may have, by source."""
        return reserve(
            self.engine,
            self.gpu,
            self.stages.ranks,
            self.tp,
            self.max_num_batched_tokens,
            self.max_num_seqs,
            self.step_tokens,
        )

    @property
    def reserve_bytes(self) -> list[int]:
        """The sum of `reserve`, of each stage."""
        return [sum(parts.values()) for parts in self.reserve]

    @property
    def gpu_memory(self) -> GpuMemory:
        """The HBM of a replica's GPUs, and what stands in it beside KV."""
        return GpuMemory(
            model=self.model.name,
            experts=any(layer.experts for layer in self.model.layers),
            gpu=self.gpu,
            gpus=self.tp * self.pp,
            engine=self.engine,
            utilization=self.gpu_memory_utilization,
            weight_bytes=self.weight_bytes,
            draft_bytes=self.draft_weight_bytes,
            reserve=self.reserve,
            cached_bytes=self.prefix_cache_hbm_bytes // (self.replicas_per_host * self.gpus_on_host),
            shares=self.held_shares(Tier.HBM),
            token_bytes=self.rank.kv_bytes_per_token,
            stated=self._stated_kv(),
        )

    def _stated_kv(self) -> Stated:
        return Stated(
            tokens=self.kv_cache_tokens,
            blocks=self.kv_cache_blocks,
            memory_bytes=self.kv_cache_memory_bytes,
            block_tokens=self.kv_cache_block_tokens,
        )

    def capacity(self) -> tuple[int, int, int]:
        """Bytes per tier of one rank for KV state, after weights, the engine's reserve and prefix caches.

        In a pipeline, bytes of whole sequences that fit on every stage. Raises ValueError when the model or a cache
        leaves nothing, and where more was asked for than a GPU holds.
        """
        hbm_bytes = self.gpu_memory.capacity().hbm_bytes
        usable = int(self.host.ddr_bytes * self.host_memory_utilization)
        ddr = (usable - self.prefix_cache_ddr_bytes) // (self.replicas_per_host * self.gpus_on_host)
        if ddr < 0:
            raise ValueError(
                f"prefix_cache_ddr={format_bytes(self.prefix_cache_ddr_bytes)} exceeds the usable "
                f"{format_bytes(usable)} of host {shown(self.host.name)}"
            )
        return hbm_bytes, fitting_bytes([ddr] * self.pp, self.held_shares(Tier.DDR)), 0
