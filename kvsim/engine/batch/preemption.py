"""Preemption: sequences give up memory to the next iteration, or to a more urgent request, and come back later."""

from kvsim.engine.batch.decoding import generated_tokens, leave, target_tokens, withdraw
from kvsim.engine.batch.memory import fits, fits_empty, hold, margin_bytes, need_beside, need_of, release, swap, used
from kvsim.engine.books.causes import preempted, prefix_ready
from kvsim.engine.features import needs
from kvsim.engine.requests.queues import take_out
from kvsim.engine.requests.tenants import pick, put, queue_again, used_by_tenant
from kvsim.engine.sessions.between_turns import evict_to_fit, evictable_bytes
from kvsim.engine.state.cluster import (
    DDR,
    DECODING,
    HBM,
    NOBODY,
    NOTHING,
    NVME,
    PREFILLING,
    PRIORITY,
    REJECTED,
    SWAPPED,
    Cluster,
    Need,
    Record,
)
from kvsim.hardware.machine import DOWN

ANY = 1 << 62  # above every priority


def preempt_to_fit(cluster: Cluster, number: int, now_s: float) -> None:
    """Preempt sequences until the next decode iteration fits, and each tenant's part of it fits its quota."""
    replica = cluster.replicas[number]
    for i in range(cluster.tenants.shape[1]):
        tenant = cluster.tenants[number, i]
        while used_by_tenant(tenant) > tenant["quota_bytes"] and tenant["decoding"]:
            _preempt(cluster, replica, _last_of(cluster, replica, i), NOBODY, now_s)
    while replica["length"][DECODING] and not evict_to_fit(cluster, number, NOTHING, 0, NOBODY):
        _preempt(cluster, replica, next_victim(cluster, number), NOBODY, now_s)


def next_victim(cluster: Cluster, number: int) -> int:
    """The decoding sequence to preempt next: the one that joined last, with `priority` of the least urgent ones."""
    replica = cluster.replicas[number]
    if cluster.world["scheduler"] == PRIORITY:
        return _least_urgent(cluster, number, DECODING, ANY)
    return int(replica["last"][DECODING])


def _least_urgent(cluster: Cluster, number: int, queue: int, below: int) -> int:
    """The last of a list's requests whose priority is the smallest, when that is below a limit."""
    chosen, least = NOBODY, below
    index = cluster.replicas[number]["last"][queue]
    while index != NOBODY:
        request = cluster.requests[index]
        priority = cluster.tenants[number, request["tenant"]]["priority"]
        if priority < least:
            chosen, least = index, priority
        index = request["before"]
    return int(chosen)


def _last_of(cluster: Cluster, replica: Record, tenant: int) -> int:
    index = replica["last"][DECODING]
    while cluster.requests[index]["tenant"] != tenant:
        index = cluster.requests[index]["before"]
    return int(index)


def below_max_num_seqs(cluster: Cluster, replica: Record) -> bool:
    """Whether a replica runs fewer sequences than it may at a time."""
    return bool(replica["length"][DECODING] + replica["length"][PREFILLING] < cluster.world["max_num_seqs"])


@needs("tenants", otherwise=False)
def may_preempt(cluster: Cluster, number: int, index: int) -> bool:
    """Whether a request may preempt others where its need does not fit: with `priority`, less urgent ones."""
    if cluster.world["scheduler"] != PRIORITY:
        return False
    priority = cluster.tenants[number, cluster.requests[index]["tenant"]]["priority"]
    for i in range(cluster.tenants.shape[1]):
        tenant = cluster.tenants[number, i]
        if tenant["priority"] < priority and (used_by_tenant(tenant) or tenant["length"][SWAPPED]):
            return True
    return False


def _bytes_below(cluster: Cluster, number: int, priority: int) -> int:
    """HBM that sequences of a smaller priority hold in the next iteration."""
    nbytes = 0
    for i in range(cluster.tenants.shape[1]):
        if cluster.tenants[number, i]["priority"] < priority:
            nbytes += used_by_tenant(cluster.tenants[number, i])
    return nbytes


@needs("tenants", otherwise=False)
def preempt_below(cluster: Cluster, number: int, index: int, need: Need, spared: int, now_s: float) -> bool:
    """Preempt strictly less urgent sequences until a request may run and its need fits; a state is not to be evicted.

    False, with nobody preempted, where all of them together hold too little HBM.
    """
    world, replica = cluster.world, cluster.replicas[number]
    if not may_preempt(cluster, number, index):
        return False
    priority = cluster.tenants[number, cluster.requests[index]["tenant"]]["priority"]
    kept_bytes = used(replica, HBM) - _bytes_below(cluster, number, priority)
    kept_bytes -= evictable_bytes(cluster, number, HBM, spared)
    margin = world["watermark_bytes"] if kept_bytes else 0
    if kept_bytes + need[HBM] + margin > world["capacity_bytes"][HBM]:
        return False
    while True:
        margin = margin_bytes(world, replica)
        if below_max_num_seqs(cluster, replica) and evict_to_fit(cluster, number, need, margin, spared):
            return True
        if not _preempt_one_below(cluster, number, priority, spared, now_s):
            return below_max_num_seqs(cluster, replica) and _recompute_swapped_below(cluster, number, priority, need)


def _recompute_swapped_below(cluster: Cluster, number: int, priority: int, need: Need) -> bool:
    """Let less urgent sequences that are swapped out be recomputed instead, where that makes a need fit.

    So that those who wait for a request never hold what it waits for.
    """
    world, replica, left = cluster.world, cluster.replicas[number], need
    for i in range(cluster.tenants.shape[1]):
        tenant = cluster.tenants[number, i]
        index = tenant["first"][SWAPPED] if tenant["priority"] < priority else NOBODY
        while index != NOBODY:
            left = need_beside(left, cluster.requests[index]["held"])
            index = cluster.requests[index]["after"]
    if not fits(world, replica, left, margin_bytes(world, replica)):
        return False
    for i in range(cluster.tenants.shape[1]):
        tenant = cluster.tenants[number, i]
        while tenant["priority"] < priority and tenant["length"][SWAPPED]:
            index = tenant["last"][SWAPPED]
            pick(cluster, number, index)
            release(cluster, index)
            _begin_anew(cluster, index, cluster.requests[index]["generated_at_join"])
    return True


def _begin_anew(cluster: Cluster, index: int, generated: float) -> None:
    """Let a sequence that is in no list wait to be recomputed up to this generated token."""
    request = cluster.requests[index]
    request["recomputed_tokens"] += int(generated)
    _drop(cluster, index, target_tokens(request) - 1)  # without the token that it would have fed next


def _drop(cluster: Cluster, index: int, tokens: int) -> None:
    """Give up the state of so many tokens of a sequence that is in no list, and let it wait to compute them anew."""
    request = cluster.requests[index]
    request["dropped_tokens"] = tokens
    request["past_tokens"] = 0
    cluster.replicas[request["replica"]]["recomputations"] += 1
    queue_again(cluster, request["replica"], index)


def _preempt_one_below(cluster: Cluster, number: int, priority: int, spared: int, now_s: float) -> bool:
    """Preempt one sequence, of the least urgent ones the one begun last; whether there is one below the priority."""
    prefilling = _least_urgent(cluster, number, PREFILLING, priority)
    if prefilling != NOBODY:
        priority = cluster.tenants[number, cluster.requests[prefilling]["tenant"]]["priority"]
    decoding = _least_urgent(cluster, number, DECODING, priority)
    if decoding != NOBODY:
        _preempt(cluster, cluster.replicas[number], decoding, spared, now_s)
        cluster.replicas[number]["batch_tokens"] += cluster.world["step_tokens"]
    elif prefilling != NOBODY:
        _abandon(cluster, number, prefilling, now_s)
    return decoding != NOBODY or prefilling != NOBODY


@needs("tenants")
def take_chunks_below(cluster: Cluster, number: int, priority: int, tokens: int) -> None:
    """Take tokens of this iteration from less urgent prompts until so many are free, or as many as they have."""
    replica = cluster.replicas[number]
    index = replica["last"][PREFILLING]  # the least urgent one
    while index != NOBODY and replica["batch_tokens"] < tokens:
        request = cluster.requests[index]
        if request["chunk_tokens"] and cluster.tenants[number, request["tenant"]]["priority"] < priority:
            taken = min(request["chunk_tokens"], tokens - replica["batch_tokens"])
            request["chunk_tokens"] -= taken
            replica["batch_tokens"] += taken
            replica["chunks"] -= request["chunk_tokens"] == 0
        index = request["before"]


def _abandon(cluster: Cluster, number: int, index: int, now_s: float) -> None:
    """Stop a prompt's prefill, to begin it anew."""
    replica, request = cluster.replicas[number], cluster.requests[index]
    if request["loading"]:
        prefix_ready(replica, request, now_s)  # as far as that goes
    preempted(replica, request, now_s)
    replica["batch_tokens"] += request["chunk_tokens"]
    replica["chunks"] -= request["chunk_tokens"] > 0
    request["chunk_tokens"] = 0
    request["preemptions"] += 1
    take_out(cluster.requests, replica, index)
    release(cluster, index)
    _drop(cluster, index, request["past_tokens"])


def _preempt(cluster: Cluster, replica: Record, index: int, spared: int, now_s: float) -> None:
    """Swap a decoding sequence out or let it begin anew; reject it where it could never run."""
    request, world = cluster.requests[index], cluster.world
    generated = generated_tokens(world, request, replica["iteration"])
    withdraw(cluster, index)  # leaves its amounts in VECTOR
    need = need_of(cluster.rows)
    if not fits_empty(cluster, index, need, 1):
        reject(cluster, index, now_s)
        return
    request["preemptions"] += 1
    request["last_token_s"] = now_s
    preempted(replica, request, now_s)
    below = (0, need[DDR] + need[HBM], need[NVME])
    if world["swaps"] and evict_to_fit(cluster, request["replica"], below, 0, spared):
        request["generated_at_join"] = generated
        hold(cluster, index, below)
        put(cluster, request["replica"], index, SWAPPED, True)
        swap(world, replica, need[HBM], DOWN)
    else:
        _begin_anew(cluster, index, generated)


def reject(cluster: Cluster, index: int, now_s: float) -> None:
    """A request could never run."""
    cluster.requests[index]["rejected"] = REJECTED
    leave(cluster, index, now_s)
