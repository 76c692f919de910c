"""Prefix caches and the requests of a cluster: what a prompt hits when it is next, loads and leaves behind.

Every function is for a replica that has caches. Replicas take note of a change by a version, and of what tiers hold.
"""

import math

from kvsim.engine.caches.eviction import learn
from kvsim.engine.caches.held import note_held
from kvsim.engine.caches.prefix_cache import accept, fetch, match, store
from kvsim.engine.caches.reuse import shorten
from kvsim.engine.caches.state import PLACES, QUEUE, SLOW, Prefixes
from kvsim.engine.caches.window import leave, wait
from kvsim.engine.features import needs
from kvsim.engine.inbound import delay
from kvsim.engine.state.cluster import DDR, HBM, NOBODY, Cluster, Prices, Record


@needs("caches")
def arrived(cluster: Cluster, number: int, index: int, now_s: float) -> None:
    """A request joins a replica's queue."""
    prefixes, chain = cluster.prefixes, cluster.prefixes.chains[index]
    if prefixes.shelf["level"] == QUEUE:
        wait(prefixes, number, index)
    if prefixes.shelf["prefetch"]:
        tier = prefixes.tiers[prefixes.caches[number, chain["part"]]["tiers"][DDR]]
        if tier["first_ahead"] == NOBODY:
            tier["first_ahead"] = index
        else:
            prefixes.chains[tier["last_ahead"]]["next_ahead"] = index
        tier["last_ahead"] = index
        _fetch_ahead(cluster, tier, now_s)


@needs("caches")
def look_up(cluster: Cluster, prices: Prices, number: int, index: int, now_s: float) -> None:
    """Have the hit of the request that is next up to date. May make detours."""
    hit, version = cluster.prefixes.hits[index], cluster.replicas[number]["cache_version"]
    if hit["version"] != version:
        match(cluster.prefixes, number, index, cluster.requests[index]["prompt_tokens"], hit)
        if cluster.prefixes.shelf["cheaper"] and (hit["load_bytes"] or hit["slow"]):
            shorten(cluster, prices, number, index, now_s)
        hit["version"] = version


@needs("caches")
def admitted(cluster: Cluster, number: int, index: int, now_s: float) -> None:
    """A request begins with what it has hit: that is used, and its slow blocks come up to DDR."""
    prefixes = cluster.prefixes
    chain, hit = prefixes.chains[index], prefixes.hits[index]
    if prefixes.shelf["level"] == QUEUE:
        leave(prefixes, number, index)
    learn(prefixes, chain)
    own, others = _changes(prefixes, number, chain["part"], HBM), _changes(prefixes, number, chain["part"], DDR)
    latency_s = accept(prefixes, number, index, hit, now_s)
    if hit["landed_s"] > now_s:  # a pipeline: latencies add up, and the slowest link sets the pace
        own_s = cluster.world["pcie_latency_s"] if hit["load_bytes"] else 0.0
        delay(cluster, index, latency_s, hit["landed_s"] + own_s)
    _publish(cluster, number, chain["part"], own, others, now_s)
    _free_ahead(cluster, number, chain, now_s)


@needs("caches")
def refused(cluster: Cluster, number: int, index: int, now_s: float) -> None:
    """A request leaves the queue and never begins."""
    if cluster.prefixes.shelf["level"] == QUEUE:
        leave(cluster.prefixes, number, index)
    _free_ahead(cluster, number, cluster.prefixes.chains[index], now_s)


@needs("caches")
def completed(cluster: Cluster, number: int, index: int, now_s: float) -> None:
    """A prompt is done: keep its state."""
    prefixes, replica, part = cluster.prefixes, cluster.replicas[number], cluster.prefixes.chains[index]["part"]
    own, others = _changes(prefixes, number, part, HBM), _changes(prefixes, number, part, DDR)
    down_bytes = store(prefixes, number, index, now_s)
    if down_bytes:
        replica["prefix_down_bytes"] += down_bytes
        replica["background_s"][1] += cluster.world["pcie_latency_s"] + down_bytes * prefixes.shelf["pcie_down_s"]
    _publish(cluster, number, part, own, others, now_s)


def _fetch_ahead(cluster: Cluster, ddr: Record, now_s: float) -> None:
    """Fetch what waiting requests need, in their order, for as long as it has room in DDR beside the others'."""
    prefixes, hit = cluster.prefixes, cluster.prefixes.hits[len(cluster.requests)]
    while ddr["first_ahead"] != NOBODY:
        index = ddr["first_ahead"]
        request, chain = cluster.requests[index], prefixes.chains[index]
        if not request["rejected"] and math.isnan(request["admitted_s"]):
            number, part, blocks = request["replica"], chain["part"], 0
            match(prefixes, number, index, request["prompt_tokens"], hit)
            for place in range(SLOW, PLACES):
                blocks += hit["blocks"][place]
            nbytes = blocks * prefixes.shelf["block_bytes"]
            if nbytes > ddr["capacity_bytes"] - ddr["taken_bytes"]:
                return
            own, others = _changes(prefixes, number, part, HBM), _changes(prefixes, number, part, DDR)
            fetch(prefixes, number, chain, hit["found"], now_s)
            for place in range(SLOW, PLACES):
                if hit["blocks"][place]:
                    tier = prefixes.caches[number, part]["tiers"][place]
                    prefixes.tiers[tier]["prefetched_blocks"] += hit["blocks"][place]
            chain["is_ahead"], chain["ahead_bytes"] = 1, nbytes
            ddr["taken_bytes"] += nbytes
            _publish(cluster, number, part, own, others, now_s)
        ddr["first_ahead"] = chain["next_ahead"]


def _free_ahead(cluster: Cluster, number: int, chain: Record, now_s: float) -> None:
    """A request has left its queue: what was fetched for it makes room for others'."""
    if chain["is_ahead"]:
        prefixes = cluster.prefixes
        ddr = prefixes.tiers[prefixes.caches[number, chain["part"]]["tiers"][DDR]]
        ddr["taken_bytes"] -= chain["ahead_bytes"]
        chain["is_ahead"] = 0
        _fetch_ahead(cluster, ddr, now_s)


def _changes(prefixes: Prefixes, number: int, part: int, place: int) -> int:
    """A number that grows when what is in the replica's own tier (HBM) or in those of others (DDR) may change."""
    changes = 0
    for at in range(place, HBM + 1 if place == HBM else PLACES):
        tier = prefixes.caches[number, part]["tiers"][at]
        if tier != NOBODY:
            changes += prefixes.tiers[tier]["changes"]
    return changes


def _publish(cluster: Cluster, number: int, part: int, own: int, others: int, now_s: float) -> None:
    """Let the replicas know of a change, and what their caches hold; DDR is divided among those of its host."""
    note_held(cluster.prefixes, number, part, now_s)
    prefixes, replicas, shelf = cluster.prefixes, cluster.replicas, cluster.prefixes.shelf
    if _changes(prefixes, number, part, HBM) != own:
        replicas[number]["cache_bytes"][HBM] = _held_bytes(prefixes, number, HBM, shelf["ranks"])
    elif _changes(prefixes, number, part, DDR) == others:
        return
    if _changes(prefixes, number, part, DDR) == others:
        replicas[number]["cache_version"] += 1
        return
    first = number // shelf["replicas_per_host"] * shelf["replicas_per_host"]
    last = min(first + shelf["replicas_per_host"], len(replicas))
    held_bytes = _held_bytes(prefixes, number, DDR, shelf["ranks"] * shelf["replicas_per_host"])
    for i in range(first, last):
        replicas[i]["cache_bytes"][DDR] = held_bytes
    if shelf["shared"]:
        first, last = 0, len(replicas)
    for i in range(first, last):
        replicas[i]["cache_version"] += 1


def _held_bytes(prefixes: Prefixes, number: int, place: int, divided: int) -> int:
    """Bytes of the entries of all parts of a tier, as one rank's share."""
    nbytes = 0
    for part in range(prefixes.shelf["parts"]):
        tier = prefixes.caches[number, part]["tiers"][place]
        if tier != NOBODY:
            nbytes += prefixes.tiers[tier]["used_bytes"] // divided
    return nbytes
