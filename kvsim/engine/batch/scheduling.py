"""Who runs in a replica's next iteration: running prompts first, then swapped and new requests as room allows."""

import math

from kvsim.engine.batch.decoding import join, target_tokens
from kvsim.engine.batch.memory import (
    exceeds_capacity,
    hold,
    margin_bytes,
    need_beside,
    need_of,
    prefill_need,
    release,
    swap,
    transfer_s,
)
from kvsim.engine.batch.plans import DECODE, amounts, find
from kvsim.engine.batch.preemption import below_max_num_seqs, may_preempt, preempt_below, reject, take_chunks_below
from kvsim.engine.books.causes import enter_batch, prefix_ready, returned
from kvsim.engine.caches.prompts import admitted, look_up, refused
from kvsim.engine.features import needs
from kvsim.engine.handoff import hands_over, reserve
from kvsim.engine.inbound import BY_LOADER, bring
from kvsim.engine.requests.queues import push_before
from kvsim.engine.requests.tenants import charge_prompt, fits_quota, next_request, pick
from kvsim.engine.sessions.between_turns import evict_to_fit, resume, state_here
from kvsim.engine.state.cluster import (
    DECODING,
    HBM,
    INCOMING,
    NOBODY,
    PREFILLING,
    PRIORITY,
    SWAPPED,
    VECTOR,
    Cluster,
    Need,
    Prices,
    Record,
)
from kvsim.hardware.machine import UP


def continue_prompts(cluster: Cluster, replica: Record, now_s: float) -> None:
    """Begin a schedule: the next chunks of the prompts that are under way and not waiting for their prefix."""
    left = cluster.world["max_num_batched_tokens"] - replica["length"][DECODING] * cluster.world["step_tokens"]
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


def admit(cluster: Cluster, prices: Prices, number: int, now_s: float) -> None:
    """Let swapped sequences return and new requests begin, in their order, until one has to wait. May make detours."""
    replica, ranked = cluster.replicas[number], cluster.world["scheduler"] == PRIORITY
    while True:
        index = next_request(cluster, number, 0)
        if index == NOBODY:
            break
        request = cluster.requests[index]
        swapped = request["queue"] == SWAPPED
        if ranked:
            priority = cluster.tenants[number, request["tenant"]]["priority"]
            wanted = cluster.world["step_tokens"] if swapped else target_tokens(request)
            take_chunks_below(cluster, number, priority, wanted)
        may_run = below_max_num_seqs(cluster, replica) or may_preempt(cluster, number, index)
        if replica["batch_tokens"] <= 0 or not may_run:
            break
        if not (_swap_in(cluster, number, index, now_s) if swapped else _begin(cluster, prices, number, index, now_s)):
            break
    if ranked:
        _continue_further(cluster, replica, now_s)


@needs("tenants")
def _continue_further(cluster: Cluster, replica: Record, now_s: float) -> None:
    """Give prompts under way what newcomers have left of an iteration.

    Of a prompt that was to begin with a part at least a token is left for later: no more has been reserved for it.
    """
    index = replica["first"][PREFILLING]
    while index != NOBODY and replica["batch_tokens"] > 0:
        request = cluster.requests[index]
        left = target_tokens(request) - request["past_tokens"] - request["chunk_tokens"]
        if left and request["ready_s"] <= now_s:
            further = min(left if request["past_tokens"] else left - 1, replica["batch_tokens"])
            replica["chunks"] += further > 0 and request["chunk_tokens"] == 0
            request["chunk_tokens"] += further
            replica["batch_tokens"] -= further
        index = request["after"]


def _begin(cluster: Cluster, prices: Prices, number: int, index: int, now_s: float) -> bool:
    """Reserve what a prompt's prefill needs and give it its first chunk; False when it and all others have to wait."""
    request, replica = cluster.requests[index], cluster.replicas[number]
    target, past, load_bytes = target_tokens(request), 0, 0
    looks_up = replica["cached"] != 0 and math.isnan(request["admitted_s"])  # what was preempted begins anew
    if looks_up:
        look_up(cluster, prices, number, index, now_s)
        past, load_bytes = cluster.prefixes.hits[index]["tokens"], cluster.prefixes.hits[index]["load_bytes"]
    turn, ready_s = state_here(cluster, number, index), now_s
    if turn != NOBODY:
        past = request["shared_tokens"]
    hands = hands_over(cluster, request)
    if hands:
        find(cluster.plans, DECODE, target, 1, 0)  # `reserve` must make no detour
    chunk = min(replica["batch_tokens"], target - past)
    need = prefill_need(cluster, target, past, chunk)
    if exceeds_capacity(cluster, index, need):
        pick(cluster, number, index)
        reject(cluster, index, now_s)
        if looks_up:
            refused(cluster, number, index, now_s)
        return True
    if not _free_memory(cluster, number, index, need, turn, now_s):
        return bool(cluster.tenants[number, request["tenant"]]["over_quota"])
    pick(cluster, number, index)
    hold(cluster, index, need)
    _enlist(cluster, number, index)
    if turn != NOBODY:
        ready_s = resume(cluster, index, turn, now_s)
    request["past_tokens"], request["chunk_tokens"], request["ready_s"] = past, 0, ready_s
    if math.isnan(request["admitted_s"]):
        request["admitted_s"], request["cached_tokens"] = now_s, past
        charge_prompt(cluster, number, index, request["prompt_tokens"] - past)
    else:
        replica["anew_tokens"] += max(0, request["dropped_tokens"] - past)
        request["dropped_tokens"] = 0
        returned(cluster, index, now_s)
    fetches = False  # blocks that are below DDR
    if looks_up:
        hit = cluster.prefixes.hits[index]
        fetches = hit["slow"] != 0 or hit["landed_s"] > now_s
    waits = load_bytes > 0 or fetches or ready_s > now_s
    if waits:
        request["loading"], request["since_s"] = 1, now_s
    if load_bytes:  # loads of a replica queue
        replica["prefix_up_bytes"] += load_bytes
        began_s, widest = max(now_s, replica["loader_free_s"]), cluster.prefixes.shelf["widest_stage"]
        replica["loader_free_s"] = began_s + transfer_s(cluster.world, replica, load_bytes, widest, UP)
        request["ready_s"] = bring(cluster, index, BY_LOADER, load_bytes, now_s, replica["loader_free_s"])
    elif not waits:
        enter_batch(replica, request)
        request["chunk_tokens"] = chunk
        replica["chunks"] += 1
        replica["batch_tokens"] -= chunk
    if hands:
        reserve(cluster, index, now_s)
    if looks_up:
        admitted(cluster, number, index, now_s)
    return True


def _swap_in(cluster: Cluster, number: int, index: int, now_s: float) -> bool:
    """Let a swapped sequence decode again; False when it and all others have to wait. May make a detour."""
    request, replica, plans, world = cluster.requests[index], cluster.replicas[number], cluster.plans, cluster.world
    generated = request["generated_at_join"]
    amounts(plans, find(plans, DECODE, target_tokens(request), int(generated), 0), cluster.rows, VECTOR)
    need = need_of(cluster.rows)
    if not _free_memory(cluster, number, index, need_beside(need, request["held"]), NOBODY, now_s):
        return bool(cluster.tenants[number, request["tenant"]]["over_quota"])
    pick(cluster, number, index)
    release(cluster, index)
    swap(world, replica, need[HBM], UP)
    join(cluster, index, generated)
    replica["late"] += 1
    replica["batch_tokens"] -= world["step_tokens"]
    returned(cluster, index, now_s)
    enter_batch(replica, request)
    return True


def _free_memory(cluster: Cluster, number: int, index: int, need: Need, state: int, now_s: float) -> bool:
    """Free memory for a request by evicting states and preempting sequences where it must; whether its need fits.

    The turn whose `state` it takes over, if any, is not evicted, and what that holds is part of the need. Where the
    need exceeds its tenant's quota, the tenant is marked as over it.
    """
    replica = cluster.replicas[number]
    if not fits_quota(cluster, number, index, need[HBM]):
        cluster.tenants[number, cluster.requests[index]["tenant"]]["over_quota"] = 1
        return False
    if state != NOBODY:
        need = need_beside(need, cluster.requests[state]["held"])
    margin = margin_bytes(cluster.world, replica)
    if below_max_num_seqs(cluster, replica) and evict_to_fit(cluster, number, need, margin, state):
        return True
    return preempt_below(cluster, number, index, need, state, now_s)


def _enlist(cluster: Cluster, number: int, index: int) -> None:
    """Let a request's prefill come after the others', with `priority` before those that are less urgent."""
    requests, replica = cluster.requests, cluster.replicas[number]
    other = replica["first"][PREFILLING]
    if cluster.world["scheduler"] == PRIORITY:
        tenants = cluster.tenants[number]
        priority = tenants[requests[index]["tenant"]]["priority"]
        while other != NOBODY and tenants[requests[other]["tenant"]]["priority"] >= priority:
            other = requests[other]["after"]
    else:
        other = NOBODY
    push_before(requests, replica, PREFILLING, index, other)


def next_ready_s(cluster: Cluster, replica: Record, now_s: float) -> float:
    """When the next cached prefix will have come up, or the next sequence's state from another replica."""
    nearest_s = math.inf
    for queue in (PREFILLING, INCOMING):
        index = replica["first"][queue]
        while index != NOBODY:
            ready_s = cluster.requests[index]["ready_s"]
            if ready_s > now_s:
                nearest_s = min(nearest_s, ready_s)
            index = cluster.requests[index]["after"]
    return float(nearest_s)
