"""The prefix caches of a cluster: tiers of the sizes asked for, wherever they stand, and what their orders know."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvsim.derive import TIERS
from kvsim.eviction import Belady, Fifo, Lfu, Lru, Order, SchedulerAware
from kvsim.foresight import Chains, NextUse, Uses
from kvsim.prefix_cache import TIER_NAMES, PrefixCache, Tier
from kvsim.prefix_links import ways
from kvsim.prefix_quota import divided
from kvsim.setup import Setup
from kvsim.units import format_bytes
from policies import Reuse, Step, plan_layer, reuse_of
from policies.plan import stored_bytes
from traces import Trace


class PrefixTiers:
    """All tiers by name, the links of each host, and each replica's caches, one for each part of a quota.

    There are none where nothing is to be cached. Raises ValueError for a trace without block ids, for a tier or a part
    of it that is smaller than one block, and for a quota that does not fit the trace's tenants.
    """

    def __init__(self, trace: Trace, setup: Setup) -> None:
        self.tiers: dict[str, list[Tier]] = {name: [] for name in TIER_NAMES}
        self.ways = [ways(setup.host) for _ in range(0, setup.replicas, setup.replicas_per_host)]
        self.caches: list[list[PrefixCache]] = [[] for _ in range(setup.replicas)]
        self.knowledge: Uses | NextUse | None = None
        self._trace, self._setup = trace, setup
        self._reuse, self._token_bytes = reuse_of(setup.policy), [n * setup.tp for n in _token_bytes(setup)]
        caches = any(setup.prefix_cache_bytes.values()) and self._reuse is not Reuse.NOTHING
        if not caches or not sum(self._token_bytes):
            return
        if not trace.block_tokens:
            raise ValueError(
                f"trace {trace.name!r} has no block ids, so no prefix can be cached; leave --prefix-cache-* out"
            )
        self._block_bytes = trace.block_tokens * sum(self._token_bytes)
        if setup.prefix_cache_eviction == "lfu":
            self.knowledge = Uses(Chains(trace, self._reuse))
        elif setup.prefix_cache_eviction == "belady":
            self.knowledge = NextUse(Chains(trace, self._reuse))
        shares, of_tenant = divided(setup.prefix_cache_quota, trace.tenants)
        self._part_of: list[int] = np.array(of_tenant)[trace.tenant].tolist()
        for share in shares:
            self._divide(share)

    def of(self, number: int, request: int) -> PrefixCache:
        """What a replica has for a request: the cache of its tenant's part."""
        return self.caches[number][self._part_of[request]]

    def held_bytes(self, number: int) -> list[int]:
        """Bytes in HBM and DDR that a replica's entries take, as `PrefixCache.held_bytes`."""
        return [sum(tier) for tier in zip(*(cache.held_bytes for cache in self.caches[number]), strict=True)]

    def _divide(self, share: float) -> None:
        """Add a cache to each replica, of a share of all tiers."""
        setup, sizes = self._setup, self._setup.prefix_cache_bytes
        remote = self._tier("remote", sizes["remote"], share)
        for number in range(setup.replicas):
            if number % setup.replicas_per_host == 0:
                ddr, nvme = self._tier("ddr", sizes["ddr"], share), self._tier("nvme", sizes["nvme"], share)
                landing_s: dict[int, float] = {}
            hbm = self._tier("hbm", sizes["hbm"] // setup.replicas_per_host, share)
            self.caches[number].append(
                PrefixCache(
                    self._reuse,
                    self._trace.block_tokens,
                    sum(self._token_bytes),
                    self._token_bytes[0],
                    (hbm, ddr, nvme, remote),
                    self.ways[number // setup.replicas_per_host],
                    landing_s,
                    setup.prefix_cache_write,
                    ranks=setup.tp,
                    replicas=setup.replicas_per_host,
                )
            )

    def _tier(self, name: str, whole_bytes: int, share: float) -> Tier:
        capacity_bytes = int(whole_bytes * share) if share < 1 else whole_bytes
        if whole_bytes and capacity_bytes < self._block_bytes:
            what = "a tier" if share == 1 else f"{share:.4g} of {format_bytes(whole_bytes)}, a tenant's part"
            raise ValueError(
                f"prefix_cache_{name}: {what} of {format_bytes(capacity_bytes)} is smaller than one block of "
                f"{format_bytes(self._block_bytes)}; make it larger or leave it out"
            )
        tier = Tier(capacity_bytes, self._order(capacity_bytes))
        self.tiers[name].append(tier)
        return tier

    def _order(self, capacity_bytes: int) -> Order:
        if isinstance(self.knowledge, Uses):
            return Lfu(self.knowledge)
        if isinstance(self.knowledge, NextUse):
            return Belady(self.knowledge)
        if self._setup.prefix_cache_eviction == "scheduler-aware":
            return SchedulerAware(capacity_bytes // self._block_bytes)
        return Fifo() if self._setup.prefix_cache_eviction == "fifo" else Lru()


def apart(trace: Trace) -> Trace:
    """The trace with its block ids renumbered so that no two tenants have one in common."""
    if len(trace.tenants) == 1 or not len(trace.block_ids):
        return trace
    tenant = np.repeat(trace.tenant.astype(np.int64), np.diff(trace.block_offsets))
    pairs = trace.block_ids * np.int64(len(trace.tenants)) + tenant
    return replace(trace, block_ids=np.unique(pairs, return_inverse=True)[1].astype(np.int32))


def _token_bytes(setup: Setup) -> Sequence[int]:
    """Bytes per tier that one rank keeps for each further token of a long prompt, staging aside."""
    kept = []
    for tokens in (1 << 20, 1 << 21):
        step = Step.decoding(tokens, 1)
        plans = [plan_layer(setup.policy, setup.rank, step, layer) for layer in range(setup.rank.n_layers)]
        stored = stored_bytes([[b for b in plan.buffers if not b.ring] for plan in plans])
        kept.append([stored[tier] for tier in TIERS])
    return [-(-(longer - long) // (1 << 20)) for long, longer in zip(*kept, strict=True)]
