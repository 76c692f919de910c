"""What becomes of a session's state between two of its turns: kept in HBM, swapped out to DDR, or computed anew.

Nobody knows whether a turn is the last. What is kept or swapped out lies in a list of its replica, the oldest first,
and makes room, in that order, for whatever would not fit. The next turn of the session goes where its state is.

`cheapest` weighs seconds when a turn ends. To bring the state back takes the smaller of its transfer up and its prefill
(Mooncake's inequality, FAST'25, section 2.2). To keep it costs nothing while nobody waits for memory, and otherwise its
share of the HBM for as long as sessions think on average; that must be worth what it saves where the session goes on.
What is kept and would rather be transferred than computed is copied to DDR meanwhile, so that nobody waits when it is
evicted from HBM.
"""

import math

from kvsim.engine.batch.estimate import prefill_s
from kvsim.engine.batch.memory import copy_s, fits, need_of, transfer_s, used
from kvsim.engine.features import needs
from kvsim.engine.inbound import BY_LOADER, bring
from kvsim.engine.requests.queues import push_before, push_last, take_out
from kvsim.engine.state.cluster import (
    DDR,
    HBM,
    KEPT,
    N_TIERS,
    NOBODY,
    NVME,
    PARKED,
    SWAPPED,
    TURNS_ANEW,
    TURNS_CHEAPEST,
    TURNS_KEEP,
    TURNS_SWAP,
    WAITING,
    Cluster,
    Need,
    Prices,
)
from kvsim.hardware.machine import DOWN, UP


@needs("sessions")
def end_turn(cluster: Cluster, index: int, now_s: float) -> None:
    """A request that is in no list has ended; its state, which is no longer held, amounts to VECTOR."""
    world, request = cluster.world, cluster.requests[index]
    if world["session_kv"] == TURNS_ANEW or not request["in_session"]:
        return
    number = request["replica"]
    replica = cluster.replicas[number]
    need = need_of(cluster.rows)
    request["state_bytes"] = need[HBM]
    choice = world["session_kv"]
    if choice == TURNS_CHEAPEST:
        choice = _cheapest(cluster, index, need)
    request["copied"] = choice == TURNS_SWAP or (choice == TURNS_KEEP and _copies(cluster, index, need[DDR]))
    if request["copied"]:
        need = (need[HBM], need[DDR] + need[HBM], need[NVME])
    if choice == TURNS_SWAP:
        need = (0, need[DDR], need[NVME])
    if choice == TURNS_ANEW or not evict_to_fit(cluster, number, need, 0, NOBODY):
        replica["turns_dropped"] += 1
        return
    for tier in range(N_TIERS):
        request["held"][tier] = need[tier]
        replica["held_bytes"][tier] += need[tier]
    request["parked_s"] = now_s
    if request["copied"]:  # behind the iterations: nobody waits for it but the session itself
        request["parked_s"] += transfer_s(world, replica, request["state_bytes"], world["widest_stage"], DOWN)
        replica["swap_down_bytes"] += request["state_bytes"]
        replica["swaps"] += request["state_bytes"] > 0
    if choice == TURNS_SWAP:
        replica["turns_swapped"] += 1
        push_last(cluster.requests, replica, PARKED, index)
    else:
        replica["turns_kept"] += 1
        push_last(cluster.requests, replica, KEPT, index)


def price_anew(cluster: Cluster, prices: Prices, index: int) -> None:
    """Note how long a request's state takes to compute anew when it has ended, if that may count. May make detours."""
    request = cluster.requests[index]
    if cluster.world["session_kv"] == TURNS_CHEAPEST and request["in_session"]:
        context_tokens = request["prompt_tokens"] + request["output_tokens"] - 1
        request["anew_s"] = prefill_s(cluster, prices, context_tokens, 0)


def _cheapest(cluster: Cluster, index: int, need: Need) -> int:
    """What to do with a state that needs so much where it is kept."""
    world, request = cluster.world, cluster.requests[index]
    replica = cluster.replicas[request["replica"]]
    up_s = copy_s(world, replica, request["state_bytes"], world["widest_stage"], UP)
    hold_s = 0.0
    waits = replica["length"][WAITING] + replica["length"][SWAPPED] > 0
    if waits or not fits(world, replica, need, int(world["watermark_bytes"])):
        hold_s = world["think_s"] * (request["state_bytes"] / world["capacity_bytes"][HBM])
    if hold_s <= world["return_share"] * min(up_s, request["anew_s"]):
        return TURNS_KEEP
    return TURNS_SWAP if up_s < request["anew_s"] else TURNS_ANEW


def _copies(cluster: Cluster, index: int, own_ddr_bytes: int) -> bool:
    """Whether a state that is kept is copied to DDR meanwhile, so that nobody waits when it is evicted."""
    world, request = cluster.world, cluster.requests[index]
    replica, nbytes = cluster.replicas[request["replica"]], request["state_bytes"]
    if (
        world["session_kv"] != TURNS_CHEAPEST
        or copy_s(world, replica, nbytes, world["widest_stage"], UP) >= request["anew_s"]
    ):
        return False
    parked_bytes = evictable_bytes(cluster, request["replica"], DDR, NOBODY)
    ddr_bytes = used(replica, DDR) - parked_bytes + own_ddr_bytes + nbytes
    return bool(ddr_bytes <= world["capacity_bytes"][DDR])


def evict_to_fit(cluster: Cluster, number: int, need: Need, margin_bytes: int, spared: int) -> bool:
    """Evict states of sessions, the oldest first but never the one that is spared, until a need fits.

    False, with none evicted, where all of them would not do.
    """
    if fits(cluster.world, cluster.replicas[number], need, margin_bytes):
        return True
    return _evict_states(cluster, number, need, margin_bytes, spared)


@needs("sessions", otherwise=False)
def _evict_states(cluster: Cluster, number: int, need: Need, margin_bytes: int, spared: int) -> bool:
    world, replica = cluster.world, cluster.replicas[number]
    for tier in range(N_TIERS):
        kept_bytes = used(replica, tier) - evictable_bytes(cluster, number, tier, spared)
        margin = margin_bytes if tier == HBM else 0
        if kept_bytes + need[tier] + margin > world["capacity_bytes"][tier]:
            return False
    while not fits(world, replica, need, margin_bytes):
        short = used(replica, HBM) + need[HBM] + margin_bytes > world["capacity_bytes"][HBM]
        victim = NOBODY
        if not short:
            victim = _oldest(cluster, number, PARKED, spared)
        if victim == NOBODY:
            victim = _oldest(cluster, number, KEPT, spared)
        if victim == NOBODY:
            return False
        _evict(cluster, victim)
    return True


def evictable_bytes(cluster: Cluster, number: int, tier: int, spared: int) -> int:
    """Bytes of a tier that states of sessions take, but for the one that is spared."""
    nbytes = 0
    for queue in (KEPT, PARKED):
        index = cluster.replicas[number]["first"][queue]
        while index != NOBODY:
            if index != spared:
                nbytes += cluster.requests[index]["held"][tier]
            index = cluster.requests[index]["after"]
    return int(nbytes)


def _oldest(cluster: Cluster, number: int, queue: int, spared: int) -> int:
    index = cluster.replicas[number]["first"][queue]
    if index != NOBODY and index == spared:
        index = cluster.requests[index]["after"]
    return int(index)


def _evict(cluster: Cluster, index: int) -> None:
    """Give up a state, or what of it is in HBM if there is a copy below."""
    request = cluster.requests[index]
    replica, nbytes = cluster.replicas[request["replica"]], request["state_bytes"]
    kept = request["queue"] == KEPT
    give_up(cluster, index)
    replica["states_evicted"] += 1
    if not kept or not request["copied"]:
        return
    request["held"][HBM] -= nbytes
    for tier in range(N_TIERS):
        replica["held_bytes"][tier] += request["held"][tier]
    younger = replica["first"][PARKED]
    while younger != NOBODY and cluster.requests[younger]["finish_s"] <= request["finish_s"]:
        younger = cluster.requests[younger]["after"]
    push_before(cluster.requests, replica, PARKED, index, younger)


def give_up(cluster: Cluster, index: int) -> None:
    """A state is no longer held, because it is dropped or because the session goes on from it."""
    request = cluster.requests[index]
    replica = cluster.replicas[request["replica"]]
    take_out(cluster.requests, replica, index)
    for tier in range(N_TIERS):
        replica["held_bytes"][tier] -= request["held"][tier]


@needs("sessions", otherwise=NOBODY)
def state_of(cluster: Cluster, index: int) -> int:
    """The turn whose state a request could go on from, at any replica; nobody where there is none."""
    parent = cluster.requests[index]["parent"]
    if parent != NOBODY and cluster.requests[parent]["queue"] in (KEPT, PARKED):
        return int(parent)
    return NOBODY


@needs("sessions", otherwise=NOBODY)
def state_here(cluster: Cluster, number: int, index: int) -> int:
    """The turn whose state a request that begins at this replica goes on from; what was preempted begins anew."""
    parent = state_of(cluster, index)
    if parent != NOBODY and math.isnan(cluster.requests[index]["admitted_s"]):
        return parent if cluster.requests[parent]["replica"] == number else NOBODY
    return NOBODY


@needs("sessions", otherwise=0.0)
def resume(cluster: Cluster, index: int, parent: int, now_s: float) -> float:
    """Let a request that has been admitted go on from a state; when all of that is in HBM."""
    world, request, state = cluster.world, cluster.requests[index], cluster.requests[parent]
    replica = cluster.replicas[state["replica"]]
    parked = state["queue"] == PARKED
    give_up(cluster, parent)
    replica["turns_resumed"] += 1
    ready_s = now_s
    if parked and state["state_bytes"]:
        tokens = state["prompt_tokens"] + state["output_tokens"]
        nbytes = -(-state["state_bytes"] * request["shared_tokens"] // tokens)
        from_s = max(now_s, state["parked_s"])
        began_s = max(from_s, replica["loader_free_s"])
        replica["loader_free_s"] = began_s + transfer_s(world, replica, nbytes, world["widest_stage"], UP)
        ready_s = bring(cluster, index, BY_LOADER, nbytes, from_s, replica["loader_free_s"])
        replica["swap_up_bytes"] += nbytes
        replica["swaps"] += 1
    return float(ready_s)
