"""What the inner loop asks about cached prefixes: what a prompt hits, what an admission loads, what a prompt leaves."""

import math
from collections import deque
from collections.abc import Sequence

from kvsim.engine.state import NOBODY, Cluster
from kvsim.machine import Machine, Sharing
from kvsim.prefix_cache import DDR, HBM, Hit, PrefixCache, Tier
from kvsim.prefix_reuse import cheapest
from kvsim.prefix_tiers import PrefixTiers
from kvsim.routing import PrefillEstimate
from kvsim.setup import Setup
from traces import Trace


class PrefixService:
    """Keeps the caches in step with the requests of a cluster.

    The loop asks when a request is next, when one whose blocks are slow is admitted, and when a prompt is done. What
    happens between (arrivals, other admissions) is seen at the next question: the caches do not change meanwhile.
    """

    def __init__(
        self,
        trace: Trace,
        setup: Setup,
        machine: Machine,
        prefixes: PrefixTiers,
        cluster: Cluster,
        prefill_s: PrefillEstimate,
    ) -> None:
        self._trace, self._setup, self._prefixes, self._machine = trace, setup, prefixes, machine
        self._prefill_s = prefill_s
        self._world, requests, self._replicas = cluster.world, cluster.requests, cluster.replicas
        self._order, self._arrival_s = cluster.order, requests["arrival_s"]
        self._replica_of, self._sender_of = requests["replica"], requests["sender"]
        self._rejected, self._admitted_s = requests["rejected"], requests["admitted_s"]
        self._ready_s, self._answer = requests["ready_s"], requests[["matched", "hit_tokens", "hit_load_bytes"]]
        self._slow, self._landed_s = requests["hit_slow"], requests["hit_landed_s"]
        self._versions, self._cache_bytes = self._replicas["cache_version"], self._replicas["cache_bytes"]
        # Who sees a change: the replicas of the host, or all of them where a tier is everybody's.
        self._on_host = [_group(n, setup.replicas_per_host, setup.replicas) for n in range(setup.replicas)]
        self._beside = [slice(None)] * setup.replicas if setup.prefix_cache_remote_bytes else self._on_host
        self._matched: dict[int, tuple[list[int], Hit]] = {}  # requests whose turn it was last
        self._aware = setup.prefix_cache_eviction == "scheduler-aware"
        self._seen = 0  # arrivals
        self._ahead: dict[int, deque[int]] = {}  # by DDR tier: waiting requests for which nothing has been fetched
        self._taken_bytes: dict[int, int] = {}  # by DDR tier: for waiting requests
        self._coming_bytes: dict[int, int] = {}  # by request

    def match(self, index: int) -> None:
        """Look up what a request would hit."""
        now_s = self._catch_up()
        number, blocks, prompt_tokens = self._asked(index)
        cache = self._prefixes.of(number, index)
        hit = cache.match(blocks, prompt_tokens, now_s)
        if hit.load_bytes or hit.slow:
            hit = self._cheapest(number, cache, blocks, prompt_tokens, hit, now_s)
        self._matched[index] = (blocks, hit)
        self._answer[index] = (self._versions[number], hit.tokens, hit.load_bytes)
        self._slow[index], self._landed_s[index] = hit.slow, hit.landed_s

    def accept(self) -> None:
        """Requests have been admitted, one of them with blocks that are not in DDR yet."""
        self._catch_up()

    def store(self, index: int) -> None:
        """Keep the state of a prompt that is done."""
        now_s = self._catch_up()
        number, blocks, prompt_tokens = self._asked(index)
        cache = self._prefixes.of(number, index)
        before = cache.changes
        down_bytes = cache.store(blocks, prompt_tokens, now_s)
        if down_bytes:
            self._replicas["prefix_down_bytes"][number] += down_bytes
            self._replicas["background_s"][number, 1] += self._machine.transfer_s(down_bytes, to_hbm=False)
        self._publish(number, cache, before)

    def _cheapest(
        self, number: int, cache: PrefixCache, blocks: Sequence[int], prompt_tokens: int, hit: Hit, now_s: float
    ) -> Hit:
        if self._setup.prefix_cache_reuse == "always":
            return hit
        replica = self._replicas[number]
        sharing = Sharing(int(replica["on_host"]), int(replica["on_switch"]))
        queue_s = max(0.0, float(replica["loader_free_s"]) - now_s)

        def load_s(nbytes: int) -> float:
            return queue_s + self._machine.transfer_s(nbytes, to_hbm=True, sharing=sharing) if nbytes else 0.0

        chunk_tokens = self._setup.max_num_batched_tokens
        return cheapest(
            cache, blocks, prompt_tokens, hit, now_s, chunk_tokens, load_s=load_s, prefill_s=self._prefill_s
        )

    def _catch_up(self) -> float:
        """See who has been admitted and who has arrived since the last question; the time now."""
        now_s = float(self._world["now_s"])
        for index in list(self._matched):
            if self._left(index):
                self._leave(index, *self._matched.pop(index), now_s)
        if self._aware or self._setup.prefix_cache_prefetch:
            arrived = int(self._world["arrived"])
            for index in self._order[self._seen : arrived].tolist():
                self._wait(index)
            self._seen = arrived
        return now_s

    def _wait(self, index: int) -> None:
        """A request has joined a queue."""
        number, blocks, prompt_tokens = self._asked(index)
        cache = self._prefixes.of(number, index)
        if self._aware:
            cache.wait(index, blocks, prompt_tokens)
        if self._setup.prefix_cache_prefetch:
            self._ahead.setdefault(id(cache.tiers[DDR]), deque()).append(index)
            self._fetch_ahead(cache.tiers[DDR], float(self._arrival_s[index]))

    def _fetch_ahead(self, ddr: Tier, now_s: float) -> None:
        """Fetch what waiting requests need, in their order, for as long as it has room in DDR beside the others'."""
        ahead, tier = self._ahead.get(id(ddr), deque()), id(ddr)
        while ahead:
            index = ahead[0]
            if not self._left(index):
                number, blocks, prompt_tokens = self._asked(index)
                cache = self._prefixes.of(number, index)
                before, taken_bytes = cache.changes, self._taken_bytes.get(tier, 0)
                nbytes = cache.prefetch(blocks, prompt_tokens, now_s, ddr.capacity_bytes - taken_bytes)
                if nbytes is None:
                    return
                self._coming_bytes[index] = nbytes
                self._taken_bytes[tier] = taken_bytes + nbytes
                self._publish(number, cache, before)
            ahead.popleft()

    def _left(self, index: int) -> bool:
        """Whether a request has left its queue: admitted, or rejected."""
        return bool(self._rejected[index]) or not math.isnan(self._admitted_s[index])

    def _leave(self, index: int, blocks: Sequence[int], hit: Hit, now_s: float) -> None:
        """A request has left its queue: admitted, or rejected."""
        number = self._number(index)
        cache = self._prefixes.of(number, index)
        if self._aware:
            cache.leave(index)
        self._accept(index, number, cache, blocks, hit, now_s)
        if index in self._coming_bytes:
            ddr = cache.tiers[DDR]
            self._taken_bytes[id(ddr)] -= self._coming_bytes.pop(index)
            self._fetch_ahead(ddr, now_s)

    def _accept(
        self, index: int, number: int, cache: PrefixCache, blocks: Sequence[int], hit: Hit, now_s: float
    ) -> None:
        if self._rejected[index]:
            return
        if self._prefixes.knowledge is not None:
            self._prefixes.knowledge.served(index)
        before = cache.changes
        landed_s, latency_s = cache.accept(blocks, hit, now_s)
        if landed_s > now_s:  # a pipeline: latencies add up, and the slowest link sets the pace
            own_s = self._machine.gpu.rates.pcie_latency_s if hit.load_bytes else 0.0
            self._ready_s[index] = max(self._ready_s[index] + latency_s, landed_s + own_s)
        self._publish(number, cache, before)

    def _publish(self, number: int, cache: PrefixCache, before: tuple[int, int]) -> None:
        """Let the replicas know of a change, and what their caches hold."""
        now = cache.changes
        if now == before:
            return
        hbm_bytes, ddr_bytes, _ = self._prefixes.held_bytes(number)
        self._cache_bytes[number, HBM] = hbm_bytes
        if now[1] == before[1]:
            self._versions[number] += 1
            return
        self._versions[self._beside[number]] += 1
        self._cache_bytes[self._on_host[number], DDR] = ddr_bytes

    def _asked(self, index: int) -> tuple[int, list[int], int]:
        """A request's replica, its prompt's blocks and tokens."""
        return self._number(index), self._trace.blocks(index).tolist(), int(self._trace.prompt_tokens[index])

    def _number(self, index: int) -> int:
        """The replica that processes a request's prompt, though another may have taken it over since."""
        sender = int(self._sender_of[index])
        return int(self._replica_of[index]) if sender == NOBODY else sender


def _group(number: int, size: int, replicas: int) -> slice:
    first = number // size * size
    return slice(first, min(replicas, first + size))
