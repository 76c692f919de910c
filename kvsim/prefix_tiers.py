"""The prefix caches of a cluster: tiers of the sizes asked for, wherever they stand, and what their orders know."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvsim.derive import TIERS
from kvsim.eviction import Belady, Fifo, Lfu, Lru, Order, SchedulerAware
from kvsim.foresight import Chains, NextUse, Uses
from kvsim.prefix_cache import TIER_NAMES, PrefixCache, Tier
from kvsim.prefix_links import Way, ways
from kvsim.setup import Setup
from kvsim.units import format_bytes
from policies import Reuse, Step, plan_layer, reuse_of
from policies.plan import stored_bytes
from traces import Trace


class PrefixTiers:
    """All tiers by name, the links of each host, and each replica's cache, None where nothing is to be cached.

    Raises ValueError for a trace without block ids and for a tier that is smaller than one block.
    """

    def __init__(self, trace: Trace, setup: Setup) -> None:
        self.tiers: dict[str, list[Tier]] = {name: [] for name in TIER_NAMES}
        self.ways: list[dict[str, Way]] = []
        self.caches: list[PrefixCache | None] = [None] * setup.replicas
        self.knowledge: Uses | NextUse | None = None
        sizes, reuse = setup.prefix_cache_bytes, reuse_of(setup.policy)
        per_token = [n * setup.tp for n in _token_bytes(setup)]
        if not any(sizes.values()) or reuse is Reuse.NOTHING or not sum(per_token):
            return
        if not trace.block_tokens:
            raise ValueError(
                f"trace {trace.name!r} has no block ids, so no prefix can be cached; leave --prefix-cache-* out"
            )
        self._block_bytes = trace.block_tokens * sum(per_token)
        self._eviction, chains = setup.prefix_cache_eviction, Chains(trace, reuse)
        if self._eviction == "lfu":
            self.knowledge = Uses(chains)
        elif self._eviction == "belady":
            self.knowledge = NextUse(chains)
        remote = self._tier("remote", sizes["remote"])
        landing_s: dict[int, float] = {}
        for number in range(setup.replicas):
            if number % setup.replicas_per_host == 0:
                ddr, nvme = self._tier("ddr", sizes["ddr"]), self._tier("nvme", sizes["nvme"])
                self.ways.append(ways(setup.host))
                landing_s = {}
            hbm = self._tier("hbm", sizes["hbm"] // setup.replicas_per_host)
            self.caches[number] = PrefixCache(
                reuse,
                trace.block_tokens,
                sum(per_token),
                per_token[0],
                (hbm, ddr, nvme, remote),
                self.ways[-1],
                landing_s,
                setup.prefix_cache_write,
                ranks=setup.tp,
                replicas=setup.replicas_per_host,
            )

    def _tier(self, name: str, capacity_bytes: int) -> Tier:
        if 0 < capacity_bytes < self._block_bytes:
            raise ValueError(
                f"prefix_cache_{name}: a tier of {format_bytes(capacity_bytes)} is smaller than one block of "
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
        if self._eviction == "scheduler-aware":
            return SchedulerAware(capacity_bytes // self._block_bytes)
        return Fifo() if self._eviction == "fifo" else Lru()


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
