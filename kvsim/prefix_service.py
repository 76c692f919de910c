"""What the inner loop asks about cached prefixes: what a prompt hits, what an admission loads, what a prompt leaves."""

from collections.abc import Sequence

from kvsim.engine.state import WAITING, Cluster
from kvsim.machine import Machine
from kvsim.prefix_cache import DDR, HBM, Hit, PrefixCache
from kvsim.prefix_tiers import PrefixTiers
from kvsim.setup import Setup
from traces import Trace


class PrefixService:
    """Keeps the caches in step with the requests of a cluster.

    The loop asks when a request is next, when one whose blocks are slow is admitted, and when a prompt is done. What
    happens between (arrivals, other admissions) is seen at the next question: the caches do not change meanwhile.
    """

    def __init__(self, trace: Trace, setup: Setup, prefixes: PrefixTiers, cluster: Cluster, machine: Machine) -> None:
        self._trace, self._prefixes, self._machine, self._world = trace, prefixes, machine, cluster.world
        requests, replicas = cluster.requests, cluster.replicas
        self._caches = prefixes.caches
        self._replica_of, self._queue, self._rejected = requests["replica"], requests["queue"], requests["rejected"]
        self._ready_s, self._answer = requests["ready_s"], requests[["matched", "hit_tokens", "hit_load_bytes"]]
        self._slow, self._landed_s = requests["hit_slow"], requests["hit_landed_s"]
        self._versions, self._cache_bytes = replicas["cache_version"], replicas["cache_bytes"]
        self._down_bytes, self._background_s = replicas["prefix_down_bytes"], replicas["background_s"]
        # Who sees a change: the replicas of the host, or all of them where a tier is everybody's.
        self._on_host = [_group(n, setup.replicas_per_host, setup.replicas) for n in range(setup.replicas)]
        self._beside = [slice(None)] * setup.replicas if setup.prefix_cache_remote_bytes else self._on_host
        self._matched: dict[int, tuple[list[int], Hit]] = {}  # requests whose turn it was last
        self._waits = setup.prefix_cache_eviction == "scheduler-aware"
        self._seen = 0  # arrivals

    def match(self, index: int) -> None:
        """Look up what a request would hit."""
        now_s = self._catch_up()
        number = int(self._replica_of[index])
        blocks = self._blocks(index)
        hit = self._cache(number).match(blocks, int(self._trace.prompt_tokens[index]), now_s)
        self._matched[index] = (blocks, hit)
        self._answer[index] = (self._versions[number], hit.tokens, hit.load_bytes)
        self._slow[index], self._landed_s[index] = hit.slow, hit.landed_s

    def accept(self) -> None:
        """Requests have been admitted, one of them with blocks that are not in DDR yet."""
        self._catch_up()

    def store(self, index: int) -> None:
        """Keep the state of a prompt that is done."""
        now_s = self._catch_up()
        number = int(self._replica_of[index])
        cache = self._cache(number)
        before = cache.changes
        down_bytes = cache.store(self._blocks(index), int(self._trace.prompt_tokens[index]), now_s)
        if down_bytes:
            self._down_bytes[number] += down_bytes
            self._background_s[number, 1] += self._machine.transfer_s(down_bytes, to_hbm=False)
        self._publish(number, before)

    def _catch_up(self) -> float:
        """See who has been admitted and who has arrived since the last question; the time now."""
        now_s = float(self._world["now_s"])
        for index in [index for index in self._matched if self._queue[index] != WAITING]:
            self._leave(index, *self._matched.pop(index), now_s)
        if self._waits:
            arrived = int(self._world["arrived"])
            for index in range(self._seen, arrived):
                cache = self._cache(int(self._replica_of[index]))
                cache.wait(index, self._blocks(index), int(self._trace.prompt_tokens[index]))
            self._seen = arrived
        return now_s

    def _leave(self, index: int, blocks: Sequence[int], hit: Hit, now_s: float) -> None:
        number = int(self._replica_of[index])
        cache = self._cache(number)
        if self._waits:
            cache.leave(index)
        if self._rejected[index]:
            return
        if self._prefixes.knowledge is not None:
            self._prefixes.knowledge.served(index)
        before = cache.changes
        landed_s, latency_s = cache.accept(blocks, hit, now_s)
        if landed_s > now_s:  # a pipeline: latencies add up, and the slowest link sets the pace
            own_s = self._machine.gpu.rates.pcie_latency_s if hit.load_bytes else 0.0
            self._ready_s[index] = max(self._ready_s[index] + latency_s, landed_s + own_s)
        self._publish(number, before)

    def _publish(self, number: int, before: tuple[int, int]) -> None:
        """Let the replicas know of a change, and what their caches hold."""
        cache = self._cache(number)
        now = cache.changes
        if now == before:
            return
        hbm_bytes, ddr_bytes, _ = cache.held_bytes
        self._cache_bytes[number, HBM] = hbm_bytes
        if now[1] == before[1]:
            self._versions[number] += 1
            return
        self._versions[self._beside[number]] += 1
        self._cache_bytes[self._on_host[number], DDR] = ddr_bytes

    def _blocks(self, index: int) -> list[int]:
        blocks: list[int] = self._trace.blocks(index).tolist()
        return blocks

    def _cache(self, number: int) -> PrefixCache:
        cache = self._caches[number]
        if cache is None:
            raise RuntimeError("a replica without a prefix cache asked for it")
        return cache


def _group(number: int, size: int, replicas: int) -> slice:
    first = number // size * size
    return slice(first, min(replicas, first + size))
