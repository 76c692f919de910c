"""When requests arrive: as recorded, or, in closed loop, some time after another one has arrived or left.

Those whose leader has not done so yet have no time; those that have one wait in a heap, the first to arrive on top.
"""

from kvsim.engine.state.cluster import NOBODY, Cluster, Records


def next_arrival(cluster: Cluster) -> int:
    """The request that arrives next, as far as is known; nobody when no arrival is."""
    world, requests = cluster.world, cluster.requests
    recorded = world["recorded"]
    while recorded < len(requests) and requests[recorded]["leader"] != NOBODY:
        recorded += 1
    world["recorded"] = recorded
    if recorded == len(requests):
        return int(cluster.known[0]) if world["known"] else NOBODY
    if world["known"] and _earlier(requests, cluster.known[0], recorded):
        return int(cluster.known[0])
    return int(recorded)


def has_arrived(cluster: Cluster, index: int) -> None:
    """The request that was next has arrived: those that go by its arrival have a time now."""
    world, request = cluster.world, cluster.requests[index]
    if request["leader"] == NOBODY:
        world["recorded"] += 1
    else:
        _pop(cluster)
    cluster.order[world["arrived"]] = index
    world["arrived"] += 1
    _lead(cluster, index, request["arrival_s"], 0)


def has_left(cluster: Cluster, index: int, now_s: float) -> None:
    """A request has ended, was rejected or timed out: those that waited for it have a time now."""
    _lead(cluster, index, now_s, 1)


def _lead(cluster: Cluster, index: int, at_s: float, after_end: int) -> None:
    requests = cluster.requests
    follower = requests[index]["follower"]
    while follower != NOBODY:
        if requests[follower]["after_end"] == after_end:
            requests[follower]["arrival_s"] = at_s + requests[follower]["delay_s"]
            _push(cluster, follower)
        follower = requests[follower]["sibling"]


def _earlier(requests: Records, one: int, other: int) -> bool:
    one_s, other_s = requests[one]["arrival_s"], requests[other]["arrival_s"]
    return bool(one_s < other_s or (one_s == other_s and one < other))


def _push(cluster: Cluster, index: int) -> None:
    known, place = cluster.known, cluster.world["known"]
    cluster.world["known"] += 1
    while place and _earlier(cluster.requests, index, known[(place - 1) // 2]):
        known[place] = known[(place - 1) // 2]
        place = (place - 1) // 2
    known[place] = index


def _pop(cluster: Cluster) -> None:
    """Take the first off the heap."""
    cluster.world["known"] -= 1
    known, size, place = cluster.known, cluster.world["known"], 0
    last = known[size]
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and _earlier(cluster.requests, known[child + 1], known[child]):
            child += 1
        if not _earlier(cluster.requests, known[child], last):
            break
        known[place] = known[child]
        place = child
    known[place] = last
