"""Prompts processed on one replica and decoded on another: memory is reserved there, state is sent and taken in.

Replicas before `prefill_replicas` process prompts, the others decode. A sequence's state streams to its receiver layer
by layer while the prompt is under way, if memory there was reserved when that began; otherwise it waits, and holds its
memory, until a receiver has room. A link carries the states that a replica sends or receives one after the other.
"""

import math

from kvsim.engine.batch.decoding import join, last_generated, target_tokens
from kvsim.engine.batch.memory import fits, margin_bytes, need_of, release
from kvsim.engine.batch.plans import DECODE, amounts, find
from kvsim.engine.books.causes import leave_batch, taken_in
from kvsim.engine.books.replica import note_change
from kvsim.engine.features import needs
from kvsim.engine.inbound import BY_NIC, BY_PEER, bring
from kvsim.engine.requests.queues import push_last, take_out
from kvsim.engine.state.cluster import (
    DECODING,
    HANDING,
    HBM,
    IDLE,
    INCOMING,
    N_TIERS,
    NOBODY,
    PREFILLING,
    RUNNING,
    SWAPPED,
    VECTOR,
    WAITING,
    Cluster,
    Need,
    Record,
)
from kvsim.hardware.machine import NVLINK


def hands_over(cluster: Cluster, request: Record) -> bool:
    """Whether a request at a replica that only processes prompts will decode, so elsewhere."""
    return bool(request["replica"] < cluster.world["prefill_replicas"] and last_generated(request) > 0)


@needs("handoff", otherwise=False)
def reserve(cluster: Cluster, index: int, now_s: float) -> bool:
    """Reserve memory for a prompt's decoding at the least loaded replica that has room; whether there is one.

    Nobody overtakes those that wait for a receiver. The plan of its first decode step is known.
    """
    world, replicas, receiver = cluster.world, cluster.replicas, NOBODY
    if _next_sender(cluster) != NOBODY:
        return False
    need = _first_need(cluster, index)
    for number in range(world["prefill_replicas"], len(replicas)):
        if _can_receive(world, replicas[number], need):
            lighter = replicas[number]["outstanding_tokens"] < replicas[receiver]["outstanding_tokens"]
            if receiver == NOBODY or lighter:
                receiver = number
    if receiver == NOBODY:
        return False
    _promise(cluster, index, receiver, need, now_s)
    return True


@needs("handoff")
def hand_over(cluster: Cluster, number: int, index: int, now_s: float) -> None:
    """A prompt that is in no list is complete, with the last chunk that this iteration had of it."""
    world, replica, request = cluster.world, cluster.replicas[number], cluster.requests[index]
    replica["outstanding_tokens"] -= request["prompt_tokens"] + request["output_tokens"]
    request["last_token_s"] = now_s
    leave_batch(replica, request)
    if request["receiver"] != NOBODY:
        began_s = request["stream_s"]
        last_share = request["chunk_tokens"] / request["prompt_tokens"]
        if not world["streams_chunks"]:  # what is built at the end of a prompt
            began_s, last_share = first_layer_s(cluster, number, now_s), 1.0
        _send(cluster, index, began_s, now_s - replica["tail_s"], last_share / world["layers"], now_s)
    elif reserve(cluster, index, now_s):
        _send(cluster, index, now_s, now_s, 0.0, now_s)
    else:
        push_last(cluster.requests, replica, HANDING, index)


@needs("handoff")
def take_back(cluster: Cluster, index: int, now_s: float) -> None:
    """A prompt will not be complete: give back what is reserved for its decoding."""
    request = cluster.requests[index]
    receiver = request["receiver"]
    if receiver == NOBODY:
        return
    replica = cluster.replicas[receiver]
    for tier in range(N_TIERS):
        replica["held_bytes"][tier] -= request["reserved"][tier]
    cluster.tenants[receiver, request["tenant"]]["held_bytes"] -= request["reserved"][HBM]
    replica["expected"] -= 1
    replica["outstanding_tokens"] -= request["prompt_tokens"] + request["output_tokens"]
    request["receiver"] = NOBODY
    note_change(cluster, receiver, now_s)


@needs("handoff")
def take_over(cluster: Cluster, number: int, now_s: float) -> None:
    """Let states that wait for a receiver come to this replica while it has room, the longest waiting first."""
    sender = _next_sender(cluster)
    while sender != NOBODY:
        index = cluster.replicas[sender]["first"][HANDING]
        need = _first_need(cluster, index)
        if not _can_receive(cluster.world, cluster.replicas[number], need):
            break
        take_out(cluster.requests, cluster.replicas[sender], index)
        _promise(cluster, index, number, need, now_s)
        _send(cluster, index, now_s, now_s, 0.0, now_s)
        sender = _next_sender(cluster)
    take_in(cluster, number, now_s)  # what stays where it is, in the host's DDR, has come at once


@needs("handoff")
def take_in(cluster: Cluster, number: int, now_s: float) -> None:
    """Let sequences whose state has arrived decode; their senders are free of it from now on."""
    replica, requests = cluster.replicas[number], cluster.requests
    index = replica["first"][INCOMING]
    while index != NOBODY:
        request, after = requests[index], requests[index]["after"]
        if request["ready_s"] <= now_s:
            take_out(requests, replica, index)
            release(cluster, index)
            replica["expected"] -= 1
            join(cluster, index, 1.0)
            replica["late"] += 1
            taken_in(replica, request, now_s)
            sender = cluster.replicas[request["sender"]]
            for tier in range(N_TIERS):
                sender["held_bytes"][tier] -= request["lent"][tier]
            cluster.tenants[request["sender"], request["tenant"]]["held_bytes"] -= request["lent"][HBM]
            note_change(cluster, request["sender"], now_s)
            if sender["phase"] == IDLE and sender["length"][WAITING]:
                sender["wake_s"] = now_s
        index = after


def first_layer_s(cluster: Cluster, number: int, now_s: float) -> float:
    """When the first layer of the iteration that ends now was done, as if layers took equally long."""
    replica = cluster.replicas[number]
    layers_s = now_s - replica["tail_s"] - replica["began_s"]
    return float(replica["began_s"] + layers_s / cluster.world["layers"])


def _next_sender(cluster: Cluster) -> int:
    """The replica with the state that has waited longest for a receiver."""
    sender, since_s = NOBODY, math.inf
    for number in range(cluster.world["prefill_replicas"]):
        first = cluster.replicas[number]["first"][HANDING]
        if first != NOBODY and cluster.requests[first]["last_token_s"] < since_s:
            sender, since_s = number, cluster.requests[first]["last_token_s"]
    return sender


def _first_need(cluster: Cluster, index: int) -> Need:
    """What a prompt needs in its first decode step, whose plan is known."""
    target = target_tokens(cluster.requests[index])
    amounts(cluster.plans, find(cluster.plans, DECODE, target, 1, 0), cluster.rows, VECTOR)
    return need_of(cluster.rows)


def _can_receive(world: Record, replica: Record, need: Need) -> bool:
    """Whether a replica can receive a state: what it needs fits, and nobody there waits or is swapped out."""
    if replica["length"][SWAPPED] or replica["length"][WAITING]:
        return False
    sequences = replica["length"][DECODING] + replica["length"][PREFILLING] + replica["expected"]
    return bool(sequences < world["max_num_seqs"] and fits(world, replica, need, margin_bytes(world, replica)))


def _promise(cluster: Cluster, index: int, receiver: int, need: Need, now_s: float) -> None:
    """Reserve what a prompt needs for decoding at its receiver."""
    replica, request = cluster.replicas[receiver], cluster.requests[index]
    request["receiver"] = receiver
    for tier in range(N_TIERS):
        request["reserved"][tier] = need[tier]
        replica["held_bytes"][tier] += need[tier]
    cluster.tenants[receiver, request["tenant"]]["held_bytes"] += need[HBM]
    replica["expected"] += 1
    replica["outstanding_tokens"] += request["prompt_tokens"] + request["output_tokens"]
    note_change(cluster, receiver, now_s)


def _send(cluster: Cluster, index: int, began_s: float, last_s: float, last_share: float, now_s: float) -> None:
    """Send a state of which some was there from `began_s` on, and the last `last_share` of it from `last_s` on.

    Nobody decodes before now. On one host state in DDR stays where it is.
    """
    world, request = cluster.world, cluster.requests[index]
    number, receiver = request["replica"], request["receiver"]
    sender, replica = cluster.replicas[number], cluster.replicas[receiver]
    free_s = max(began_s, sender["link_free_s"], replica["link_free_s"])
    if sender["first_neighbour"] == replica["first_neighbour"]:
        nbytes, seconds = request["sent"][HBM], request["sent"][HBM] * world["peer_byte_s"]
        way, latency_s, done_s = BY_PEER, world["peer_latency_s"], free_s + seconds
        sender["handoff_peer_bytes"] += nbytes
        sender["busy_s"][NVLINK] += seconds
    else:
        nbytes = 0
        for tier in range(N_TIERS):
            nbytes += request["sent"][tier]
        seconds = nbytes * max(world["tp"] / world["nic_Bps"], world["pcie_down_s"])
        way, latency_s, done_s = BY_NIC, world["nic_latency_s"], free_s + seconds
        done_s = max(done_s, _through_adapters(cluster, number, receiver, nbytes, free_s))
        sender["handoff_nic_bytes"] += nbytes
        sender["nic_s"] += seconds
    request["ready_s"] = now_s
    if nbytes:
        come_s = max(done_s, last_s + last_share * seconds)
        sender["link_free_s"] = replica["link_free_s"] = come_s
        request["ready_s"] = bring(cluster, index, way, nbytes, now_s, max(now_s, come_s + latency_s))
    for tier in range(N_TIERS):
        request["lent"][tier], request["held"][tier] = request["held"][tier], request["reserved"][tier]
    request["sender"], request["replica"] = number, receiver
    push_last(cluster.requests, replica, INCOMING, index)
    if replica["phase"] == IDLE or (replica["phase"] == RUNNING and not replica["cut"]):
        replica["wake_s"] = min(replica["wake_s"], request["ready_s"])


def _through_adapters(cluster: Cluster, sender: int, receiver: int, nbytes: int, from_s: float) -> float:
    """When the last of these bytes is through the adapters of both hosts, which serve one GPU after the other."""
    done_s, seconds = from_s, nbytes * cluster.world["tp"] / cluster.world["nic_Bps"]
    for way, end in enumerate((sender, receiver)):
        host = cluster.replicas[cluster.replicas[end]["first_neighbour"]]
        host["adapters_free_s"][way] = max(host["adapters_free_s"][way], from_s) + seconds
        done_s = max(done_s, host["adapters_free_s"][way])
    return float(done_s)
