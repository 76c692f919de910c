"""Cached prefixes over tiers of memory: which blocks of a prompt need no prefill, and what their state weighs."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvsim.eviction import Lru, Order, SchedulerAware
from kvsim.prefix_links import Way
from policies import Reuse

TIER_NAMES = ("hbm", "ddr", "nvme", "remote")
HBM, DDR = range(2)
WRITES = ("through", "back")
SHARINGS = ("tenant", "all")  # who may hit a block: its tenant alone, lest latency tells others of it, or everybody
MOST_LANDING = 10_000  # blocks whose time of landing is past, before they are forgotten


class Tier:
    """Entries of known size in one memory, least recently used first out or as another order says."""

    def __init__(self, capacity_bytes: int, order: Order | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.order = Lru() if order is None else order
        self.used_bytes = 0
        self.lookup_blocks = 0
        self.hit_blocks = 0
        self.prefetched_blocks = 0
        self.changes = 0
        self.entries: dict[int, int] = {}

    def use(self, keys: Sequence[int]) -> None:
        """A request used these entries, those that are here."""
        entries = self.entries
        self.order.use([key for key in keys if key in entries])

    def renew(self, keys: Sequence[int]) -> None:
        """Rank these entries, those that are here, above what continues them."""
        self.order.renew([key for key in keys if key in self.entries])

    def put_chain(self, keys: Sequence[int], nbytes: int) -> tuple[list[int], dict[int, int]]:
        """Keep a chain's entries of one size, its head where not all fit.

        Those that are new, from the tail, and those evicted, in order, with their bytes.
        """
        entries = self.entries
        fitting = keys if len(keys) * nbytes <= self.capacity_bytes else keys[: self.capacity_bytes // nbytes]
        missing = [key for key in fitting if key not in entries]
        if not missing:
            self.order.use(fitting)
            return [], {}
        present = [key for key in fitting if key in entries] if len(missing) < len(fitting) else []
        self.order.renew(present)  # lest they make room for their own tail
        evicted: dict[int, int] = {}
        added: list[int] = []
        free_bytes, order = self.capacity_bytes - self.used_bytes, self.order
        for key in reversed(missing):
            while free_bytes < nbytes:
                victim = order.evict(key)
                if victim is None:
                    break
                evicted[victim] = entries.pop(victim)
                free_bytes += evicted[victim]
            else:
                if key not in entries:  # an id may stand twice in a prompt
                    entries[key] = nbytes
                    order.add(key)
                    free_bytes -= nbytes
                    added.append(key)
        self.used_bytes = self.capacity_bytes - free_bytes
        if present:
            self.renew(fitting)
        self.changes += bool(added or evicted)
        return added, evicted


class Hit(NamedTuple):
    """The cached head of a prompt: its tokens, what must come up to HBM, its blocks per tier, its keys."""

    tokens: int
    load_bytes: int  # of one rank, over PCIe
    blocks: tuple[int, ...]  # by tier, each block where it is found first
    keys: Sequence[int]
    landed_s: float  # when those of its blocks that are on their way to DDR will be there
    slow: bool  # whether blocks must come up to DDR first


class PrefixCache:
    """What a replica finds: its own HBM tier, over the DDR and NVMe tiers of its host, over a pool of all hosts.

    `tiers` are in the order of `TIER_NAMES`; those of no capacity are off. `token_bytes` and `token_hbm_bytes` are what
    the policy keeps per prompt token, in all and in HBM, over all ranks. A policy whose state spans a whole prefix is
    reused only for the very same prompt, which takes ids that cover all of it. Written `through`, a prompt's state goes
    to every tier; written `back`, it goes to the first one, and down from a tier when that evicts it.
    `landing_s` is the host's: when blocks on their way up to DDR will be there.
    """

    def __init__(
        self,
        reuse: Reuse,
        block_tokens: int,
        token_bytes: int,
        token_hbm_bytes: int,
        tiers: Sequence[Tier],
        ways: Mapping[str, Way] | None = None,
        landing_s: dict[int, float] | None = None,
        write: str = "through",
        ranks: int = 1,
        replicas: int = 1,
    ) -> None:
        self.reuse, self.block_tokens = reuse, block_tokens
        self.block_bytes, self.block_hbm_bytes = block_tokens * token_bytes, block_tokens * token_hbm_bytes
        self.tiers = tuple(tiers)
        self._on = [i for i, tier in enumerate(self.tiers) if tier.capacity_bytes]
        self._slow = [i for i in self._on if i > DDR]
        self._ways = {TIER_NAMES.index(name): way for name, way in (ways or {}).items()}
        self._landing_s = {} if landing_s is None else landing_s
        self._aware = [tier.order for tier in self.tiers if isinstance(tier.order, SchedulerAware)]
        self._back, self._ranks, self._replicas = write == "back", ranks, replicas

    @property
    def changes(self) -> tuple[int, int]:
        """Two numbers that grow when what is found in the replica's own tier, or in those of others, may change."""
        hbm, ddr, nvme, remote = self.tiers
        return hbm.changes, ddr.changes + nvme.changes + remote.changes

    @property
    def held_bytes(self) -> list[int]:
        """Bytes in HBM and DDR that the entries take, as one rank's share; DDR is divided among its replicas."""
        hbm, ddr = self.tiers[HBM].used_bytes, self.tiers[DDR].used_bytes
        return [hbm // self._ranks, ddr // (self._ranks * self._replicas), 0]

    def match(self, blocks: Sequence[int], prompt_tokens: int, now_s: float = 0.0, most: int | None = None) -> Hit:
        """The longest cached head of a prompt, or its first `most` entries; at most all of it but one token."""
        keys = self.keys(blocks, prompt_tokens)[:most]
        places = [self.tiers[i].entries for i in self._on]
        counts = [0] * len(places)
        found = 0
        for key in keys:
            for place, entries in enumerate(places):
                if key in entries:
                    counts[place] += 1
                    break
            else:
                break
            found += 1
        n = self._blocks_per_key(blocks)
        by_tier = [0] * len(self.tiers)
        for i, count in zip(self._on, counts, strict=True):
            by_tier[i] = count * n
        return Hit(
            tokens=min(found * n * self.block_tokens, prompt_tokens - 1),
            load_bytes=(found * n - by_tier[HBM]) * self.block_hbm_bytes // self._ranks,
            blocks=tuple(by_tier),
            keys=keys[:found],
            landed_s=self._landed_s(keys[:found], now_s) if self._landing_s else 0.0,
            slow=any(by_tier[i] for i in self._slow),
        )

    def place(self, key: int) -> int | None:
        """The first tier that has an entry."""
        return next((i for i in self._on if key in self.tiers[i].entries), None)

    def accept(self, blocks: Sequence[int], hit: Hit, now_s: float = 0.0) -> tuple[float, float]:
        """A prompt reuses its cached head: count it, and bring slow blocks up to DDR.

        When they are all there, and how long the first byte of a slow one takes.
        """
        lookups = len(blocks)
        for i in self._on:
            tier = self.tiers[i]
            tier.lookup_blocks += lookups
            tier.hit_blocks += hit.blocks[i]
            lookups -= hit.blocks[i]
            tier.use(hit.keys)
        if not hit.slow:
            return hit.landed_s, 0.0
        landed_s = self._fetch(hit.keys, self._blocks_per_key(blocks), now_s)
        return max(hit.landed_s, landed_s), max(self._ways[i].up.latency_s for i in self._slow if hit.blocks[i])

    def prefetch(self, blocks: Sequence[int], prompt_tokens: int, now_s: float, room_bytes: int) -> int | None:
        """Bring a waiting prompt's slow blocks up to DDR; the bytes that they take there, None if they have no room."""
        hit, n = self.match(blocks, prompt_tokens, now_s), self._blocks_per_key(blocks)
        coming = {i: hit.blocks[i] for i in self._slow if hit.blocks[i]}
        nbytes = sum(coming.values()) * self.block_bytes
        if nbytes > room_bytes:
            return None
        self._fetch(hit.keys, n, now_s)
        for i, count in coming.items():
            self.tiers[i].prefetched_blocks += count
        return nbytes

    def _fetch(self, keys: Sequence[int], blocks: int, now_s: float) -> float:
        """Bring those of a chain's entries that are in slow tiers alone up to DDR; when the last will be there."""
        ddr = self.tiers[DDR]
        above = [self.tiers[i].entries for i in self._on if i <= DDR]
        landed_s, coming = 0.0, set[int]()
        for i in self._slow:
            entries = self.tiers[i].entries
            here = [k for k in keys if k in entries and k not in coming and not any(k in e for e in above)]
            if here:
                coming.update(here)
                done_s = self._ways[i].up.send(len(here) * blocks * self.block_bytes, now_s)
                landed_s = max(landed_s, done_s)
                self._landing_s.update(dict.fromkeys(here, done_s))
        if ddr.capacity_bytes and coming:
            chain = [key for key in keys if key in coming or key in ddr.entries]
            self._keep(self._on.index(DDR), chain, blocks * self.block_bytes, now_s, from_hbm=False)
        return landed_s

    def fetch_s(self, hit: Hit, now_s: float) -> float:
        """How long it would take from now until a hit's blocks are in DDR."""
        sizes = {i: hit.blocks[i] * self.block_bytes for i in self._slow if hit.blocks[i]}
        waits_s = [self._ways[i].up.would_take_s(nbytes, now_s) for i, nbytes in sizes.items()]
        return max(0.0, hit.landed_s - now_s, *waits_s)

    def store(self, blocks: Sequence[int], prompt_tokens: int, now_s: float = 0.0) -> int:
        """Keep a finished prompt's state; the bytes of one rank that go down over PCIe."""
        keys, nbytes = self.keys(blocks, prompt_tokens), self._blocks_per_key(blocks) * self.block_bytes
        if self._back:
            return self._keep(0, keys, nbytes, now_s, from_hbm=True)
        staged = set[int]()
        for i in self._on:
            tier = self.tiers[i]
            added, _ = tier.put_chain(keys, nbytes)
            if i > HBM and added:
                staged.update(added if i == DDR else [k for k in added if k not in self.tiers[DDR].entries])
                if i > DDR:
                    self._ways[i].down.send(len(added) * nbytes, now_s)
        return self._hbm_bytes(len(staged) * nbytes)

    def _keep(self, place: int, keys: Sequence[int], nbytes: int, now_s: float, *, from_hbm: bool) -> int:
        """Put a chain into one tier, and below what it evicts or does not take; the bytes that go down over PCIe."""
        i = self._on[place]
        tier = self.tiers[i]
        added, evicted = tier.put_chain(keys, nbytes)
        down_bytes = 0
        if i > HBM and added:
            down_bytes += self._hbm_bytes(len(added) * nbytes) if from_hbm else 0
            if i > DDR:
                self._ways[i].down.send(len(added) * nbytes, now_s)
        if self._back and place + 1 < len(self._on):
            for key, size_bytes in evicted.items():  # tails first, and the heads above them
                down_bytes += self._keep(place + 1, [key], size_bytes, now_s, from_hbm=i == HBM)
                self.tiers[self._on[place + 1]].renew([key])
            refused = [key for key in keys if key not in tier.entries]
            if refused:
                down_bytes += self._keep(place + 1, refused, nbytes, now_s, from_hbm=from_hbm)
        return down_bytes

    def _hbm_bytes(self, nbytes: int) -> int:
        """What of so many bytes of entries is in HBM while a sequence runs, on each rank."""
        return nbytes // self.block_bytes * self.block_hbm_bytes // self._ranks

    def _landed_s(self, keys: Sequence[int], now_s: float) -> float:
        landing_s, hbm = self._landing_s, self.tiers[HBM].entries
        landed_s = max((landing_s[key] for key in keys if key in landing_s and key not in hbm), default=0.0)
        if landed_s <= now_s and len(landing_s) > MOST_LANDING:
            for key in [key for key, done_s in landing_s.items() if done_s <= now_s]:
                del landing_s[key]
        return landed_s

    def wait(self, request: int, blocks: Sequence[int], prompt_tokens: int) -> None:
        """A request joins the replica's queue."""
        keys = self.keys(blocks, prompt_tokens)
        for order in self._aware:
            order.wait(request, keys)

    def leave(self, request: int) -> None:
        """A request leaves the replica's queue."""
        for order in self._aware:
            order.leave(request)

    def keys(self, blocks: Sequence[int], prompt_tokens: int) -> Sequence[int]:
        """The entries of a prompt, head first."""
        if self.reuse is Reuse.BLOCKS:
            return blocks
        whole = self.reuse is Reuse.PREFIX and len(blocks) * self.block_tokens >= prompt_tokens
        return blocks[-1:] if whole else ()

    def _blocks_per_key(self, blocks: Sequence[int]) -> int:
        return len(blocks) if self.reuse is Reuse.PREFIX else 1
