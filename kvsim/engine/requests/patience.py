"""Requests that leave because their first token has not come in time, and what that makes room for.

Requests whose patience is equal stand in a list in the order of their arrival, so the first of each list is the next to
lose it; who has its first token by then is passed over. A token that comes at the very moment is in time.
"""

import math

from kvsim.engine.batch.decoding import leave
from kvsim.engine.batch.memory import release
from kvsim.engine.batch.runs import cut_run
from kvsim.engine.caches.prompts import refused
from kvsim.engine.features import needs
from kvsim.engine.handoff import take_back
from kvsim.engine.requests.queues import take_out
from kvsim.engine.requests.tenants import pick
from kvsim.engine.state.cluster import IDLE, NOBODY, PREFILLING, RUNNING, TIMED_OUT, WAITING, Cluster


def has_come(cluster: Cluster, index: int) -> None:
    """A request has arrived: its patience begins."""
    requests = cluster.requests
    if requests[index]["patience"] == NOBODY:
        return
    own = cluster.patience[requests[index]["patience"]]
    if own["first"] == NOBODY:
        own["first"] = index
    else:
        requests[own["last"]]["later"] = index
    own["last"] = index


def next_departure(cluster: Cluster) -> int:
    """The request that leaves next unless its first token comes before; nobody when none is impatient."""
    requests, nearest, nearest_s = cluster.requests, NOBODY, math.inf
    for i in range(len(cluster.patience)):
        own = cluster.patience[i]
        index = own["first"]
        while index != NOBODY and (requests[index]["rejected"] or not math.isnan(requests[index]["first_token_s"])):
            index = requests[index]["later"]
        own["first"] = index
        if index != NOBODY and departure_s(cluster, index) < nearest_s:
            nearest, nearest_s = index, departure_s(cluster, index)
    return int(nearest)


def departure_s(cluster: Cluster, index: int) -> float:
    """When a request leaves without its first token; never, for nobody."""
    if index == NOBODY:
        return math.inf
    request = cluster.requests[index]
    return float(request["arrival_s"] + cluster.patience[request["patience"]]["timeout_s"])


@needs("impatience", otherwise=NOBODY)
def depart(cluster: Cluster, index: int, now_s: float) -> int:
    """Let a request leave its queue, and its batch when the iteration under way is over; its replica is returned."""
    request = cluster.requests[index]
    number = request["replica"]
    replica = cluster.replicas[number]
    request["rejected"] = TIMED_OUT
    leave(cluster, index, now_s)
    held_up = True  # others
    if request["queue"] == WAITING:
        held_up = cluster.tenants[number, request["tenant"]]["first"][WAITING] == index
        pick(cluster, number, index)
        if replica["cached"] and math.isnan(request["admitted_s"]):
            refused(cluster, number, index, now_s)
    if held_up and replica["phase"] == IDLE:
        replica["wake_s"] = now_s
    elif held_up and replica["phase"] == RUNNING and not replica["cut"]:
        cut_run(cluster, number, now_s)
    return int(number)


@needs("impatience")
def drop_departed(cluster: Cluster, number: int, now_s: float) -> None:
    """Take prompts whose requests have left out of the batch, and free their memory."""
    requests, replica = cluster.requests, cluster.replicas[number]
    index = replica["first"][PREFILLING] if len(cluster.patience) else NOBODY
    while index != NOBODY:
        after = requests[index]["after"]
        if requests[index]["rejected"] == TIMED_OUT:
            requests[index]["chunk_tokens"] = 0
            take_out(requests, replica, index)
            release(cluster, index)
            take_back(cluster, index, now_s)
        index = after
