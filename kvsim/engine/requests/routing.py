"""Which replica takes a request, where that depends on what the replicas' prefix caches hold.

A router sees each replica as a candidate, looked at when the request arrives.
"""

from kvsim.engine.batch.estimate import prefill_s
from kvsim.engine.caches.prefix_cache import fetch_s, match
from kvsim.engine.caches.state import Prefixes
from kvsim.engine.features import needs
from kvsim.engine.state.cluster import (
    HBM,
    ITERATING,
    KV_AWARE,
    NOBODY,
    PREFILLING,
    QUEUES,
    STALLED,
    Cluster,
    Prices,
    Record,
    Records,
)

BALANCE_REQUESTS, BALANCE_RATIO = 64, 1.5  # defaults of SGLang's cache-aware router: balance_abs_ and _rel_threshold
PICOSECONDS = 1e12  # in a second: sums of whole ones are exact, however requests come and go


@needs("caches", otherwise=NOBODY)
def route(cluster: Cluster, prices: Prices, index: int, now_s: float) -> int:
    """The replica of a request that arrives, of those that its tenant may go to. May make detours."""
    pin, candidates = cluster.pins[cluster.requests[index]["pin"]], cluster.prefixes.candidates
    first, n = pin["first"], pin["n_replicas"]
    for i in range(n):
        _look(cluster, index, first + i, first, candidates[i], now_s)
    if cluster.world["router"] != KV_AWARE:
        return int(first + prefix_affinity(candidates, n))
    for i in range(n):
        _estimate(cluster, prices, index, first + i, i, now_s)
    chosen = kv_aware(candidates, n)
    cluster.requests[index]["prefill_ps"] = round(PICOSECONDS * candidates[chosen]["prefill_s"])
    return int(first + chosen)


def prefix_affinity(candidates: Records, n: int) -> int:
    """The replica that holds the longest head of the prompt, the least loaded of these.

    So that one hot prefix does not swamp a replica, the least loaded of all takes the request while one has more than
    `BALANCE_REQUESTS` requests above another and `BALANCE_RATIO` times as many (SGLang's cache-aware router).
    """
    most = fewest = candidates[0]["requests"]
    longest = 0
    for i in range(n):
        most, fewest = max(most, candidates[i]["requests"]), min(fewest, candidates[i]["requests"])
        longest = max(longest, candidates[i]["cached_tokens"])
    if most - fewest > BALANCE_REQUESTS and most > BALANCE_RATIO * fewest:
        longest = 0
    chosen = NOBODY
    for i in range(n):
        able = candidates[i]["cached_tokens"] >= longest
        if able and (
            chosen == NOBODY or candidates[i]["outstanding_tokens"] < candidates[chosen]["outstanding_tokens"]
        ):
            chosen = i
    return chosen


def kv_aware(candidates: Records, n: int) -> int:
    """The replica of the smallest estimated TTFT, the least loaded of these (Mooncake, arXiv:2407.00079, algorithm 1).

    Its other branch, a head copied from one replica to another, is not taken: a head lies in a replica's own caches.
    """
    chosen = 0
    for i in range(1, n):
        one, best = candidates[i], candidates[chosen]
        if one["ttft_s"] < best["ttft_s"] or (
            one["ttft_s"] == best["ttft_s"] and one["outstanding_tokens"] < best["outstanding_tokens"]
        ):
            chosen = i
    return chosen


def _look(cluster: Cluster, index: int, number: int, first: int, candidate: Record, now_s: float) -> None:
    """See a replica's load, and what it would load; those of a host without a tier of their own find the same."""
    prefixes, replica, request = cluster.prefixes, cluster.replicas[number], cluster.requests[index]
    candidate["outstanding_tokens"], candidate["requests"] = replica["outstanding_tokens"], 0
    for queue in range(QUEUES):
        candidate["requests"] += replica["length"][queue]
    candidate["cached_tokens"], candidate["ttft_s"] = 0, 0.0
    if not replica["cached"]:
        return
    hit = prefixes.hits[len(cluster.requests)]
    if number == first or not _finds_the_same(prefixes, number, prefixes.chains[index]["part"]):
        match(prefixes, number, index, request["prompt_tokens"], hit)
    candidate["cached_tokens"] = hit["tokens"]
    load_s = 0.0
    if hit["load_bytes"]:
        load_s = max(0.0, replica["loader_free_s"] - now_s)
        load_s += cluster.world["pcie_latency_s"] + hit["load_bytes"] * prefixes.shelf["pcie_up_s"]
    candidate["ttft_s"] = max(load_s, fetch_s(prefixes, number, hit, now_s))


def _finds_the_same(prefixes: Prefixes, number: int, part: int) -> bool:
    """Whether a replica finds what the one before it does."""
    per_host = prefixes.shelf["replicas_per_host"]
    return bool(number % per_host and prefixes.caches[number, part]["tiers"][HBM] == NOBODY)


def _estimate(cluster: Cluster, prices: Prices, index: int, number: int, i: int, now_s: float) -> None:
    """A TTFT: queue + transfer + what is left of the iteration + prefill of what is not cached. May make detours."""
    candidates, replica = cluster.prefixes.candidates, cluster.replicas[number]
    candidate = candidates[i]
    same = 0  # a replica looked at before of which as much is cached
    while candidates[same]["cached_tokens"] != candidate["cached_tokens"]:
        same += 1
    if same == i:
        prompt_tokens = cluster.requests[index]["prompt_tokens"]
        candidate["prefill_s"] = prefill_s(cluster, prices, prompt_tokens, candidate["cached_tokens"])
    else:
        candidate["prefill_s"] = candidates[same]["prefill_s"]
    ttft_s = _queue_s(cluster, replica) + candidate["ttft_s"]
    if replica["phase"] in (ITERATING, STALLED):
        ttft_s += max(0.0, replica["wake_s"] - now_s)
    candidate["ttft_s"] = ttft_s + candidate["prefill_s"]


def _queue_s(cluster: Cluster, replica: Record) -> float:
    """The prefill that is before a newcomer, beyond the iteration under way."""
    waiting_s = replica["queued_ps"] / PICOSECONDS
    index = replica["first"][PREFILLING]
    while index != NOBODY:
        request = cluster.requests[index]
        left = request["prompt_tokens"] + request["recomputed_tokens"] - request["past_tokens"]
        if replica["phase"] in (ITERATING, STALLED):
            left -= request["chunk_tokens"]
        share = min(1.0, left / max(1, request["prompt_tokens"] - request["cached_tokens"]))
        waiting_s += request["prefill_ps"] / PICOSECONDS * share
        index = request["after"]
    return float(waiting_s)
