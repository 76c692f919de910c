"""The prefix caches of a cluster: tiers of the sizes asked for, wherever they stand, and what their orders know."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvsim.engine.caches.foresight import Chains, next_uses
from kvsim.engine.caches.state import (
    CACHE,
    CANDIDATE,
    CHAIN,
    ENTRY,
    HELD,
    HIT,
    LINK,
    NEXT_USE,
    NONE,
    PLACES,
    QUEUE,
    SHELF,
    SLOW,
    TIER,
    TIER_NAMES,
    Prefixes,
)
from kvsim.engine.state.cluster import NOBODY
from kvsim.hardware.catalogue import Host
from kvsim.hardware.machine import DOWN, UP
from kvsim.iteration.arrays import Ints, Records
from kvsim.plans.derive import TIERS
from kvsim.scenario.choices import EVICTION_ORDERS, LEVELS
from kvsim.scenario.quotas import divided
from kvsim.scenario.setup import Setup
from kvsim.text.units import format_bytes
from policies import Reuse, Step, plan_layer, reuse_of
from policies.plan import stored_bytes
from policies.shown import shown
from traces import Trace


class PrefixTiers:
    """All tiers by name, and what the inner loop needs of them; `on` says whether anything is cached at all.

    Raises ValueError for a trace without block ids, for a tier or a part of it that is smaller than one block, and for
    a quota that does not fit the trace's tenants.
    """

    def __init__(self, trace: Trace, setup: Setup) -> None:
        self._setup, self._reuse = setup, reuse_of(setup.policy)
        stages = [_token_bytes(setup, own) for own in setup.stages.layers]
        self._token_bytes = [n * setup.tp for n in map(sum, zip(*stages, strict=True))]
        self._stage_bytes = [sum(kept) for kept in stages]
        self._host_bytes = [0] * (setup.stages.hosts[-1] + 1)  # that the hosts of a replica have of it
        for host, nbytes in zip(setup.stages.hosts, self._stage_bytes, strict=True):
            self._host_bytes[host] += nbytes
        whole = sum(self._host_bytes)
        self.host_shares = [nbytes / whole for nbytes in self._host_bytes] if whole else [1.0]
        sizes = setup.prefix_cache_bytes
        self.on = any(sizes.values()) and self._reuse is not Reuse.NOTHING and sum(self._token_bytes) > 0
        if self.on and not trace.block_tokens:
            raise ValueError(
                f"trace {shown(trace.name)} has no block ids, so no prefix can be cached; leave --prefix-cache-* out"
            )
        self._block_bytes = trace.block_tokens * sum(self._token_bytes)
        shares, of_tenant = divided(setup.prefix_cache_quota, trace.tenants) if self.on else ([], [])
        tiers, caches = self._lay_out(shares)
        chains = Chains(trace, self._reuse if self.on else Reuse.NOTHING)
        self.arrays = cache_arrays(
            chains,
            np.array(of_tenant, np.int64)[trace.tenant] if self.on else np.zeros(0, np.int64),
            tiers,
            caches,
            links_of(setup.host, self._hosts),
            order=setup.prefix_cache_eviction,
            back=setup.prefix_cache_write == "back",
            replicas_per_host=setup.replicas_per_host,
            block_tokens=trace.block_tokens,
            block_bytes=self._block_bytes,
        )
        shelf, machine, rates = self.arrays.shelf, setup.machine(), setup.gpu.rates
        shelf["cheaper"], shelf["prefetch"] = setup.prefix_cache_reuse == "cheaper", setup.prefix_cache_prefetch
        shelf["shared"], shelf["ranks"] = sizes["remote"] > 0, setup.tp
        shelf["block_hbm_bytes"] = trace.block_tokens * self._token_bytes[0]
        in_hbm = [kept[0] for kept in stages]
        self.stage_shares = tuple(nbytes / max(1, sum(in_hbm)) for nbytes in in_hbm)  # of what a block has in HBM
        shelf["widest_stage"] = max(self.stage_shares)
        self.arrays.links["Bps"] /= max(self.host_shares)  # each host moves its part of a block
        floor_s = machine.copy_floor_s
        shelf["pcie_up_s"], shelf["pcie_down_s"] = (
            shelf["widest_stage"] * max(1 / rates.pcie_h2d_Bps, floor_s),
            shelf["widest_stage"] * max(1 / rates.pcie_d2h_Bps, floor_s),
        )

    def tiers(self, name: str) -> Records:
        """All tiers of a name."""
        which = np.unique(self.arrays.caches["tiers"][..., TIER_NAMES.index(name)])
        found: Records = self.arrays.tiers[which[which != NOBODY]]
        return found

    def held(self, name: str, until_s: float) -> list[tuple[int, float]]:
        """What each memory of a tier below DDR held at its fullest, and the integral over time up to `until_s`."""
        which = np.unique(self.tiers(name)["memory"])
        memories = self.arrays.held[which]
        byte_s = memories["byte_s"] + memories["nbytes"] * (until_s - memories["since_s"])
        return list(zip(memories["peak_bytes"].tolist(), byte_s.tolist(), strict=True))

    def links(self, name: str, direction: int) -> Records:
        """Each host's link to or from a tier below DDR."""
        links: Records = self.arrays.links[:, TIER_NAMES.index(name) - SLOW, direction]
        return links

    @property
    def _hosts(self) -> int:
        return -(-self._setup.replicas // self._setup.replicas_per_host)

    def _lay_out(self, shares: Sequence[float]) -> tuple[Records, Records]:
        """For each part of a quota a share of all tiers; what each replica finds of each part."""
        setup, hosts, sizes = self._setup, self._hosts, self._sizes()
        numbers = np.arange(setup.replicas)
        where = [numbers, numbers // setup.replicas_per_host, numbers // setup.replicas_per_host, 0 * numbers]
        caches = np.full((setup.replicas, len(shares)), NOBODY, dtype=CACHE)
        rows: list[tuple[int, int]] = []
        for part, share in enumerate(shares):
            for place, (name, whole_bytes) in enumerate(zip(TIER_NAMES, sizes, strict=True)):
                capacity_bytes = self._share_of(name, whole_bytes, share)
                if capacity_bytes:
                    caches["tiers"][:, part, place] = len(rows) + where[place]
                    memories = (setup.replicas, hosts, hosts, 1)
                    base = sum(memories[:place])
                    rows += [(capacity_bytes, base + i) for i in range(memories[place])]
        tiers = np.zeros(len(rows), dtype=TIER)
        tiers["capacity_bytes"], tiers["memory"] = np.array(rows, np.int64).reshape(-1, 2).T
        return tiers, caches

    def _sizes(self) -> list[int]:
        """Of one tier of each name: whole blocks that fit where stages and hosts hold their parts of each."""
        setup = self._setup
        hbm, ddr, nvme, remote = setup.prefix_cache_bytes.values()
        stage = hbm * setup.tp // (setup.replicas_per_host * setup.gpus_on_host)
        on_hosts = [_fitting_bytes(size, self._host_bytes) for size in (ddr, nvme)]
        return [_fitting_bytes(stage, self._stage_bytes), *on_hosts, remote]

    def _share_of(self, name: str, whole_bytes: int, share: float) -> int:
        capacity_bytes = int(whole_bytes * share) if share < 1 else whole_bytes
        if whole_bytes and capacity_bytes < self._block_bytes:
            what = "a tier" if share == 1 else f"{share:.4g} of {format_bytes(whole_bytes)}, a tenant's part"
            raise ValueError(
                f"prefix_cache_{name}: {what} of {format_bytes(capacity_bytes)} is smaller than one block of "
                f"{format_bytes(self._block_bytes)}; make it larger or leave it out"
            )
        return capacity_bytes


def cache_arrays(
    chains: Chains,
    parts: Ints,
    tiers: Records,
    caches: Records,
    links: Records,
    *,
    order: str,
    back: bool,
    replicas_per_host: int,
    block_tokens: int,
    block_bytes: int,
) -> Prefixes:
    """Caches with nothing in them, of the tiers whose capacity and memory are given.

    `parts` says which part of the tiers each request's prompt may use. What a block has in HBM is all of it.
    """
    shelf = np.zeros(1, dtype=SHELF)[0]
    level = LEVELS.index(EVICTION_ORDERS[order].level)
    shelf["parts"], shelf["back"] = caches.shape[1], back
    shelf["level"], shelf["renewed_by_use"] = level, EVICTION_ORDERS[order].renewed_by_use
    shelf["replicas_per_host"], shelf["ranks"], shelf["keys"] = replicas_per_host, 1, chains.keys
    shelf["block_tokens"], shelf["block_bytes"], shelf["block_hbm_bytes"] = block_tokens, block_bytes, block_bytes
    for name in ("first_beyond", "last_beyond", "first_ahead", "last_ahead"):
        tiers[name] = NOBODY
    tiers["capacity_blocks"] = tiers["capacity_bytes"] // max(1, block_bytes)
    rooms = np.minimum(tiers["capacity_blocks"], chains.keys)
    tiers["first"] = np.cumsum(rooms) - rooms
    room, n = int(rooms.sum()), len(parts)
    tiers["ring"] = room + np.arange(len(tiers))
    requests = np.zeros(n, dtype=CHAIN)
    hits = np.zeros(n + 1, dtype=HIT)
    hits["version"] = NOBODY
    known, after = np.zeros(chains.keys, np.int64), np.zeros(0, np.int64)
    if n:
        requests["first"], requests["length"] = chains.offsets[:-1], chains.lengths
        requests["blocks"], requests["blocks_per_key"] = chains.blocks, chains.blocks_per_key
        requests["part"], requests["next_ahead"] = parts, NOBODY
    if level == NEXT_USE:
        known, after = next_uses(chains)
    longest = int(chains.lengths.max(initial=0))
    slow = (caches["tiers"][..., SLOW:] != NOBODY).any()
    # Tails sink before their heads, and what is fetched from a slow tier leaves out what HBM has: gaps in a tier.
    within = level == NONE and not back and not slow
    shelf["closed"] = within and n > 0 and chains.are_prefixes(parts)
    return Prefixes(
        shelf=shelf,
        caches=caches,
        tiers=tiers,
        held=np.zeros(1 + int(tiers["memory"].max(initial=-1)), dtype=HELD),
        entries=np.zeros(room, dtype=ENTRY),
        heap=np.arange(room),
        ages=np.repeat(np.arange(room + len(tiers)), 2).reshape(-1, 2),
        table=_table(room),
        needs=_table(room if level == QUEUE else 0),
        keys=chains.flat,
        chains=requests,
        hits=hits,
        known=known,
        after=after,
        landing_s=np.zeros((len(links), chains.keys if slow else 0)),
        links=links,
        marks=np.zeros((2, longest), np.int64),
        rest=np.zeros(longest, np.int64),
        evicted=np.zeros((room, 2), np.int64),
        sinking=np.zeros((1 + (room + longest if back else 0), 5), np.int64),
        candidates=np.zeros(len(caches), dtype=CANDIDATE),
    )


def _table(room: int) -> Ints:
    """Rows for so many keys, half of them free."""
    return np.zeros((1 << (2 * room + 1).bit_length(), 2), np.int64)


def links_of(host: Host, hosts: int) -> Records:
    """From and to the slow tiers of each host, no faster than its DDR."""
    links = np.zeros((hosts, PLACES - SLOW, 2), dtype=LINK)
    rates = (
        (host.nvme_read_Bps, host.nvme_write_Bps, host.nvme_latency_s),
        (host.nic_Bps, host.nic_Bps, host.nic_latency_s),
    )
    for slow, (up_Bps, down_Bps, latency_s) in enumerate(rates):
        links["Bps"][:, slow, UP], links["Bps"][:, slow, DOWN] = min(up_Bps, host.ddr_Bps), min(down_Bps, host.ddr_Bps)
        links["latency_s"][:, slow] = latency_s
    return links


def apart(trace: Trace) -> Trace:
    """The trace with its block ids renumbered so that no two tenants have one in common."""
    if len(trace.tenants) == 1 or not len(trace.block_ids):
        return trace
    tenant = np.repeat(trace.tenant.astype(np.int64), np.diff(trace.block_offsets))
    pairs = trace.block_ids * np.int64(len(trace.tenants)) + tenant
    return replace(trace, block_ids=np.unique(pairs, return_inverse=True)[1].astype(np.int32))


def _fitting_bytes(room: int, parts: Sequence[int]) -> int:
    """Bytes of all parts of something that fit where each has so much room."""
    return min((room * sum(parts) // part for part in parts if part), default=room)


def _token_bytes(setup: Setup, layers: Sequence[int]) -> Sequence[int]:
    """Bytes per tier that one rank of these layers keeps for each further token of a long prompt, staging aside."""
    kept, rank = [], setup.rank  # which is made anew each time that it is asked for
    for tokens in (1 << 20, 1 << 21):
        step = Step.decoding(tokens, 1)
        plans = [plan_layer(setup.policy, rank, step, layer) for layer in layers]
        stored = stored_bytes([[b for b in plan.buffers if not b.ring] for plan in plans])
        kept.append([stored[tier] for tier in TIERS])
    return [-(-(longer - long) // (1 << 20)) for long, longer in zip(*kept, strict=True)]
