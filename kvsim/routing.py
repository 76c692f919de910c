"""Which replica takes a request, where that depends on what the replicas' prefix caches hold.

A router sees each replica as a `Candidate`, looked at when the request arrives.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np

from kvsim.derive import PlanTable
from kvsim.engine.state import ITERATING, PREFILLING, STALLED, WAITING, Cluster
from kvsim.machine import Machine
from kvsim.makespan import Clock, Load
from kvsim.prefix_tiers import PrefixTiers
from kvsim.setup import CACHE_ROUTERS, Setup
from traces import Trace

BALANCE_REQUESTS, BALANCE_RATIO = 64, 1.5  # defaults of SGLang's cache-aware router: balance_abs_ and _rel_threshold
PrefillEstimate: TypeAlias = Callable[[int, int], float]
"""Seconds that a prompt's prefill takes by itself, from its tokens and those of them that are cached."""


class Candidate(NamedTuple):
    """A replica as a router sees it."""

    requests: int  # that it has and that have not left
    outstanding_tokens: int  # prompts and outputs of these
    cached_tokens: int  # of the prompt's head
    ttft_s: float  # estimated, if it takes the request


def prefix_affinity(candidates: Sequence[Candidate]) -> int:
    """The replica that holds the longest head of the prompt, the least loaded of these.

    So that one hot prefix does not swamp a replica, the least loaded of all takes the request while one has more than
    `BALANCE_REQUESTS` requests above another and `BALANCE_RATIO` times as many (SGLang's cache-aware router).
    """
    most, fewest = (f(c.requests for c in candidates) for f in (max, min))
    guarded = most - fewest > BALANCE_REQUESTS and most > BALANCE_RATIO * fewest
    longest = 0 if guarded else max(c.cached_tokens for c in candidates)
    able = [i for i, c in enumerate(candidates) if c.cached_tokens >= longest]
    return min(able, key=lambda i: candidates[i].outstanding_tokens)


def kv_aware(candidates: Sequence[Candidate]) -> int:
    """The replica of the smallest estimated TTFT, the least loaded of these (Mooncake, arXiv:2407.00079, algorithm 1).

    Its other branch, a head copied from one replica to another, is not taken: a head lies in a replica's own caches.
    """
    return min(range(len(candidates)), key=lambda i: (candidates[i].ttft_s, candidates[i].outstanding_tokens))


_CHOOSE = dict(zip(CACHE_ROUTERS, (prefix_affinity, kv_aware), strict=True))


class Router:
    """Chooses by a look into the prefix caches of all replicas."""

    def __init__(
        self, trace: Trace, setup: Setup, machine: Machine, prefixes: PrefixTiers, prefill_s: PrefillEstimate
    ) -> None:
        self._trace, self._prefixes, self._machine, self._estimate = trace, prefixes, machine, prefill_s
        self._choose = _CHOOSE[setup.router]
        self._prefill_s = np.zeros(len(trace))  # of each request where it went
        self._front = setup.prefill_replicas or setup.replicas  # that take requests
        self._oldest = 0  # all requests before it have left
        self._newest = 0  # none after it has arrived

    def choose(self, cluster: Cluster, index: int) -> int:
        """The replica of a request that arrives, of those that its tenant may go to."""
        candidates, pin = self.candidates(cluster, index), cluster.pins[cluster.requests[index]["pin"]]
        first = int(pin["first"])
        chosen = first + self._choose(candidates[first : first + int(pin["n_replicas"])])
        prompt_tokens = int(self._trace.prompt_tokens[index])
        self._prefill_s[index] = self._estimate(prompt_tokens, candidates[chosen].cached_tokens)
        return chosen

    def candidates(self, cluster: Cluster, index: int) -> list[Candidate]:
        """All replicas that take requests; a TTFT is estimated as queue + transfer + prefill of what is not cached."""
        blocks, prompt_tokens = self._trace.blocks(index).tolist(), int(self._trace.prompt_tokens[index])
        now_s, queue_s = float(cluster.requests[index]["arrival_s"]), self._queue_s(cluster, index)
        candidates = []
        for number, replica in enumerate(cluster.replicas[: self._front]):
            ttft_s, cached_tokens = queue_s[number], 0
            if replica["cached"]:
                cache = self._prefixes.of(number, index)
                hit = cache.match(blocks, prompt_tokens, now_s)
                cached_tokens, load_s = hit.tokens, 0.0
                if hit.load_bytes:
                    load_s = max(0.0, replica["loader_free_s"] - now_s)
                    load_s += self._machine.transfer_s(hit.load_bytes, to_hbm=True)
                ttft_s += max(load_s, cache.fetch_s(hit, now_s))
            if replica["phase"] in (ITERATING, STALLED):
                ttft_s += max(0.0, replica["wake_s"] - now_s)
            ttft_s += self._estimate(prompt_tokens, cached_tokens)
            requests, tokens = int(replica["length"].sum()), int(replica["outstanding_tokens"])
            candidates.append(Candidate(requests, tokens, cached_tokens, ttft_s))
        return candidates

    def _queue_s(self, cluster: Cluster, index: int) -> list[float]:
        """For each replica the prefill that is before a request, beyond the iteration under way."""
        requests, replicas = cluster.requests, cluster.replicas
        self._newest = max(self._newest, index)
        while self._oldest < self._newest and (
            requests[self._oldest]["rejected"] or not np.isnan(requests[self._oldest]["finish_s"])
        ):
            self._oldest += 1
        rows = requests[self._oldest : self._newest + 1]
        queued = np.flatnonzero((rows["queue"] == WAITING) | (rows["queue"] == PREFILLING))
        rows = rows[queued]
        under_way = np.isin(replicas["phase"][rows["replica"]], (ITERATING, STALLED)) & (rows["queue"] == PREFILLING)
        target = rows["prompt_tokens"] + rows["recomputed_tokens"]
        done = np.where(rows["queue"] == PREFILLING, rows["past_tokens"], 0) + under_way * rows["chunk_tokens"]
        share = np.minimum(1.0, (target - done) / np.maximum(1, rows["prompt_tokens"] - rows["cached_tokens"]))
        waiting_s = self._prefill_s[self._oldest + queued] * share
        seconds: list[float] = np.bincount(rows["replica"], weights=waiting_s, minlength=len(replicas)).tolist()
        return seconds


def prefill_estimate(table: PlanTable, clock: Clock, chunk_tokens: int) -> PrefillEstimate:
    """Times of prefills alone: exact in one chunk, and the first and the last whole one averaged for several.

    (A chunk's time grows about evenly with what comes before it.)
    """

    def chunk_s(prompt_tokens: int, past_tokens: int, new_tokens: int) -> float:
        last = past_tokens + new_tokens == prompt_tokens
        load = Load(*table.prefill(prompt_tokens, past_tokens, new_tokens))
        return clock.iteration([load], new_tokens, int(last))[0]

    @lru_cache(maxsize=1 << 16)
    def prefill_s(prompt_tokens: int, cached_tokens: int) -> float:
        whole, rest = divmod(prompt_tokens - cached_tokens, chunk_tokens)
        seconds = chunk_s(prompt_tokens, prompt_tokens - rest, rest) if rest else 0.0
        if whole:
            ends = cached_tokens, cached_tokens + (whole - 1) * chunk_tokens
            seconds += whole * sum(chunk_s(prompt_tokens, past, chunk_tokens) for past in ends) / 2
        return seconds

    return prefill_s
