"""One rank's memory for KV state: what a prompt needs of it, what fits, and how long it takes to move some of it."""

from kvsim.engine.batch.decoding import last_generated, target_tokens
from kvsim.engine.batch.plans import DECODE, PREFILL, amounts, find
from kvsim.engine.state.cluster import (
    DDR,
    DECODING,
    HBM,
    N_TIERS,
    NVME,
    PREFILLING,
    STORED,
    VECTOR,
    Cluster,
    Ints,
    Need,
    Record,
)
from kvsim.hardware.machine import D2H, H2D, UP, byte_s

AMPLE = 8  # where so many times a prompt's need would fit, an output no longer than the prompt need not be examined


def need_of(rows: Ints) -> Need:
    """The bytes of each tier that VECTOR stores."""
    return int(rows[VECTOR, STORED + HBM]), int(rows[VECTOR, STORED + DDR]), int(rows[VECTOR, STORED + NVME])


def need_beside(need: Need, held: Ints) -> Need:
    """What a need asks for where some bytes of each tier are held for it already."""
    return int(need[HBM] - held[HBM]), int(need[DDR] - held[DDR]), int(need[NVME] - held[NVME])


def fits(world: Record, replica: Record, need: Need, margin_bytes: int) -> bool:
    """Whether a need fits beside what the next iteration of a replica holds, with a margin of HBM."""
    for tier in range(N_TIERS):
        used_bytes = used(replica, tier) + need[tier] + (margin_bytes if tier == HBM else 0)
        if used_bytes > world["capacity_bytes"][tier]:
            return False
    return True


def fits_empty(cluster: Cluster, index: int, need: Need, times: int) -> bool:
    """Whether so many times a request's need fits an empty memory, and its tenant's quota."""
    world, request = cluster.world, cluster.requests[index]
    quota_bytes = cluster.tenants[request["replica"], request["tenant"]]["quota_bytes"]
    for tier in range(N_TIERS):
        capacity_bytes = world["capacity_bytes"][tier]
        if tier == HBM:
            capacity_bytes = min(capacity_bytes, quota_bytes)
        if times * need[tier] > capacity_bytes:
            return False
    return True


def margin_bytes(world: Record, replica: Record) -> int:
    """HBM kept free at admission, so that a newcomer does not force a preemption at once, unless nothing else runs."""
    if replica["length"][DECODING] or replica["length"][PREFILLING]:
        return int(world["watermark_bytes"])
    return 0


def prefill_need(cluster: Cluster, target: int, past: int, new: int) -> Need:
    """The most that a prompt's prefill stores: at its end, after one step or after a last whole chunk.

    `past` and `new` tokens are those of its first step. May make a detour.
    """
    if past or new < target:
        new = min(cluster.world["max_num_batched_tokens"], target - 1)
        past = target - new
    piece = find(cluster.plans, PREFILL, target, past, new)
    amounts(cluster.plans, piece, cluster.rows, VECTOR)
    return need_of(cluster.rows)


def exceeds_capacity(cluster: Cluster, index: int, need: Need) -> bool:
    """Whether a request whose prefill needs this exceeds the capacity or its quota, in prefill or at its last token.

    (One that outgrows the memory although its last token was not examined is rejected then.) May make a detour.
    """
    request = cluster.requests[index]
    target = target_tokens(request)
    if request["output_tokens"] <= target and fits_empty(cluster, index, need, AMPLE):
        return False
    piece = find(cluster.plans, DECODE, target, max(1, last_generated(request)), 0)
    if not fits_empty(cluster, index, need, 1):
        return True
    amounts(cluster.plans, piece, cluster.rows, VECTOR)
    return not fits_empty(cluster, index, need_of(cluster.rows), 1)


def copy_s(world: Record, replica: Record, nbytes: int, share: float, direction: int) -> float:
    """Time to move one contiguous piece between HBM and DDR at a fair share of the host.

    Each stage moves its part, a `share` of it at the most.
    """
    lane, link_s = (H2D, world["pcie_up_s"]) if direction == UP else (D2H, world["pcie_down_s"])
    return float(world["pcie_latency_s"] + nbytes * share * byte_s(link_s, replica["sharing"], lane))


def transfer_s(world: Record, replica: Record, nbytes: int, share: float, direction: int) -> float:
    """Time of a copy between HBM and DDR, booked as one behind the iterations; 0 of no bytes."""
    if not nbytes:
        return 0.0
    seconds = copy_s(world, replica, nbytes, share, direction)
    replica["background_s"][direction] += seconds
    return seconds


def swap(world: Record, replica: Record, nbytes: int, direction: int) -> None:
    """Move a session's HBM bytes; the next iteration waits for it."""
    replica["stall_s"] += transfer_s(world, replica, nbytes, world["widest_stage"], direction)
    replica["stalls"] += nbytes > 0
    replica["stall_bytes"][direction] += nbytes
    replica["swaps"] += 1
    if direction == UP:
        replica["swap_up_bytes"] += nbytes
    else:
        replica["swap_down_bytes"] += nbytes


def used(replica: Record, tier: int) -> int:
    """Bytes that the next iteration holds."""
    return int(replica["held_bytes"][tier] + replica["stored_bytes"][tier])


def hold(cluster: Cluster, index: int, need: Need) -> None:
    """Reserve what a request needs."""
    request = cluster.requests[index]
    replica = cluster.replicas[request["replica"]]
    for tier in range(N_TIERS):
        request["held"][tier] = need[tier]
        replica["held_bytes"][tier] += need[tier]
    cluster.tenants[request["replica"], request["tenant"]]["held_bytes"] += need[HBM]


def release(cluster: Cluster, index: int) -> None:
    """Give back what is reserved for a request."""
    request = cluster.requests[index]
    replica = cluster.replicas[request["replica"]]
    cluster.tenants[request["replica"], request["tenant"]]["held_bytes"] -= request["held"][HBM]
    for tier in range(N_TIERS):
        replica["held_bytes"][tier] -= request["held"][tier]
        request["held"][tier] = 0
