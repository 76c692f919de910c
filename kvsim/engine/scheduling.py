"""Who runs in a replica's next iteration: running prompts first, then swapped and new requests as room allows.

`next_waiting` is the one place that says whose turn it is.
"""

import math

from kvsim.engine.attribution import enter_batch, preempted, prefix_ready, returned
from kvsim.engine.decoding import generated_tokens, join, leave, target_tokens, withdraw
from kvsim.engine.memory import (
    DOWN,
    UP,
    fits,
    fits_alone,
    hold,
    margin_bytes,
    never_fits,
    release,
    set_need,
    set_prefill_need,
    swap,
    transfer_s,
)
from kvsim.engine.plans import DECODE, amounts, find
from kvsim.engine.queues import push_first, push_last, take_out
from kvsim.engine.state import (
    DDR,
    DECODING,
    HBM,
    NOBODY,
    PREFILLING,
    STORED,
    SWAPPED,
    TIERS,
    VECTOR,
    WAITING,
    WANT_ACCEPT,
    WANT_MATCH,
    Cluster,
    Detour,
    Record,
)


def next_waiting(replica: Record) -> int:
    """The waiting request whose turn it is: first come, first served."""
    return int(replica["first"][WAITING])


def next_victim(replica: Record) -> int:
    """The decoding sequence that makes room: the one that joined last."""
    return int(replica["last"][DECODING])


def make_room(cluster: Cluster, replica: Record, now_s: float) -> None:
    """Preempt sequences until the next decode iteration fits."""
    need_bytes = cluster.world["need_bytes"]
    while replica["length"][DECODING]:
        for tier in range(TIERS):
            need_bytes[tier] = 0
        if fits(cluster.world, replica, 0):
            break
        _preempt(cluster, replica, next_victim(replica), now_s)


def _preempt(cluster: Cluster, replica: Record, index: int, now_s: float) -> None:
    request, world = cluster.requests[index], cluster.world
    generated = generated_tokens(request, replica["iteration"])
    withdraw(cluster, index)  # leaves its amounts in VECTOR
    set_need(cluster)
    if not fits_alone(world, 1):
        _reject(replica, request)
        return
    request["preemptions"] += 1
    request["last_token_s"] = now_s
    preempted(replica, request, now_s)
    hbm_bytes = world["need_bytes"][HBM]
    world["need_bytes"][HBM] = 0
    world["need_bytes"][DDR] += hbm_bytes
    if world["swaps"] and fits(world, replica, 0):
        request["generated_at_join"] = generated
        hold(world, replica, request)
        push_first(cluster.requests, replica, SWAPPED, index)
        swap(world, replica, hbm_bytes, DOWN)
    else:
        request["recomputed_tokens"] += generated
        request["past_tokens"] = 0
        push_first(cluster.requests, replica, WAITING, index)


def continue_prompts(cluster: Cluster, replica: Record, now_s: float) -> None:
    """Begin a schedule: the next chunks of the prompts that are under way and not waiting for their prefix."""
    left = cluster.world["max_num_batched_tokens"] - replica["length"][DECODING]
    replica["chunks"] = 0
    index = replica["first"][PREFILLING]
    while index != NOBODY:
        request = cluster.requests[index]
        request["chunk_tokens"] = 0
        if request["loading"] and request["ready_s"] <= now_s:
            prefix_ready(replica, request, now_s)
        if left > 0 and request["ready_s"] <= now_s:
            chunk = min(left, target_tokens(request) - request["past_tokens"])
            request["chunk_tokens"] = chunk
            replica["chunks"] += 1
            left -= chunk
        index = request["after"]
    replica["batch_tokens"] = left


def admit(cluster: Cluster, replica: Record, now_s: float) -> None:
    """Let swapped sequences return, the one that joined first first, then new ones begin. May make detours."""
    while replica["length"][SWAPPED] and _may_run(cluster, replica):
        if not _swap_in(cluster, replica, replica["first"][SWAPPED], now_s):
            break
        replica["batch_tokens"] -= 1
    while replica["length"][WAITING] and not replica["length"][SWAPPED] and _may_run(cluster, replica):
        if not _begin(cluster, replica, next_waiting(replica), now_s):
            break


def _may_run(cluster: Cluster, replica: Record) -> bool:
    running = replica["length"][DECODING] + replica["length"][PREFILLING]
    return bool(replica["batch_tokens"] > 0 and running < cluster.world["max_num_seqs"])


def _begin(cluster: Cluster, replica: Record, index: int, now_s: float) -> bool:
    """Reserve what a prompt's prefill needs and give it its first chunk; False when it has to wait."""
    request = cluster.requests[index]
    target, past, load_bytes = target_tokens(request), 0, 0
    looks_up = replica["cached"] != 0 and request["recomputed_tokens"] == 0
    if looks_up:
        if request["matched"] != replica["cache_version"]:
            cluster.world["wanted"][0], cluster.world["wanted"][1] = WANT_MATCH, index
            cluster.world["now_s"] = now_s
            raise Detour
        past, load_bytes = request["hit_tokens"], request["hit_load_bytes"]
    chunk = min(replica["batch_tokens"], target - past)
    set_prefill_need(cluster, target, past, chunk)
    if never_fits(cluster, request):
        take_out(cluster.requests, replica, index)
        _reject(replica, request)
        return True
    if not fits(cluster.world, replica, margin_bytes(cluster.world, replica)):
        return False
    take_out(cluster.requests, replica, index)
    hold(cluster.world, replica, request)
    push_last(cluster.requests, replica, PREFILLING, index)
    request["past_tokens"], request["chunk_tokens"], request["ready_s"] = past, 0, now_s
    if math.isnan(request["admitted_s"]):
        request["admitted_s"], request["cached_tokens"] = now_s, past
    else:
        returned(request, now_s)
    fetches = looks_up and (request["hit_slow"] != 0 or request["hit_landed_s"] > now_s)  # blocks that are below DDR
    if load_bytes or fetches:
        request["loading"], request["since_s"] = 1, now_s
    if load_bytes:  # loads of a replica queue
        replica["prefix_up_bytes"] += load_bytes
        began_s = max(now_s, replica["loader_free_s"])
        replica["loader_free_s"] = began_s + transfer_s(cluster.world, replica, load_bytes, UP)
        request["ready_s"] = replica["loader_free_s"]
    elif not fetches:
        enter_batch(replica, request)
        request["chunk_tokens"] = chunk
        replica["chunks"] += 1
        replica["batch_tokens"] -= chunk
    if fetches:
        cluster.world["wanted"][0], cluster.world["wanted"][1] = WANT_ACCEPT, index
        cluster.world["now_s"] = now_s
        raise Detour
    return True


def _swap_in(cluster: Cluster, replica: Record, index: int, now_s: float) -> bool:
    request, plans, world = cluster.requests[index], cluster.plans, cluster.world
    generated = request["generated_at_join"]
    amounts(plans, find(plans, DECODE, target_tokens(request), generated, 0), cluster.rows, VECTOR)
    set_need(cluster)
    for tier in range(TIERS):
        world["need_bytes"][tier] -= request["held"][tier]
    if not fits(world, replica, margin_bytes(world, replica)):
        return False
    hbm_bytes = cluster.rows[VECTOR, STORED + HBM]
    take_out(cluster.requests, replica, index)
    release(replica, request)
    swap(world, replica, hbm_bytes, UP)
    join(cluster, index, generated)
    replica["late"] += 1
    returned(request, now_s)
    enter_batch(replica, request)
    return True


def _reject(replica: Record, request: Record) -> None:
    request["rejected"] = 1
    leave(replica, request)


def next_ready_s(cluster: Cluster, replica: Record, now_s: float) -> float:
    """When the next cached prefix will have come up."""
    nearest_s, index = math.inf, replica["first"][PREFILLING]
    while index != NOBODY:
        ready_s = cluster.requests[index]["ready_s"]
        if ready_s > now_s:
            nearest_s = min(nearest_s, ready_s)
        index = cluster.requests[index]["after"]
    return float(nearest_s)
