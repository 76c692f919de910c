"""The sequences of a replica that decode: what they amount to together, and when one of them ends or changes."""

from kvsim.engine.batch.plans import DECODE, NEVER, amounts, evaluate, find, slopes, steps_until_change
from kvsim.engine.books.replica import note_member
from kvsim.engine.requests.arrivals import has_left
from kvsim.engine.requests.queues import push_last, take_out
from kvsim.engine.requests.tenants import advance_tenants
from kvsim.engine.speculation import pace, steps_over
from kvsim.engine.state.cluster import COUNT, DECODING, HBM, N_TIERS, NOBODY, SLOPE, STORED, VECTOR, Cluster, Record


def target_tokens(request: Record) -> int:
    """Tokens that its prefill has to process: the prompt, and after a recomputation the output so far as well."""
    return int(request["prompt_tokens"] + request["recomputed_tokens"])


def last_generated(request: Record) -> int:
    """The last generated token that is fed back, counted from what was prefilled: the one after it ends the request."""
    return int(request["output_tokens"] - request["recomputed_tokens"] - 1)


def generated_tokens(world: Record, request: Record, iteration: int) -> float:
    """The generated token that a decode iteration feeds; a mean where steps emit several."""
    return float(request["generated_at_join"] + (iteration - request["joined"]) * world["tokens_per_step"])


def join(cluster: Cluster, index: int, generated: float) -> None:
    """Let a request that is in no list decode from this generated token on; its plan is known."""
    replica = cluster.replicas[cluster.requests[index]["replica"]]
    push_last(cluster.requests, replica, DECODING, index)
    _add(cluster, index, generated)


def withdraw(cluster: Cluster, index: int) -> None:
    """Let a request decode no further, and note which sequence is due next; leaves its amounts in VECTOR."""
    remove(cluster, index)
    set_next_due(cluster, cluster.replicas[cluster.requests[index]["replica"]])


def remove(cluster: Cluster, index: int) -> None:
    """Let a request decode no further; the caller notes later which sequence is due next. Its amounts are in VECTOR."""
    take_out(cluster.requests, cluster.replicas[cluster.requests[index]["replica"]], index)
    note_member(cluster, index, -1)
    _subtract(cluster, index)


def set_amounts(cluster: Cluster, index: int) -> None:
    """Set VECTOR to what a decoding request amounts to in the next iteration, and SLOPE to its growth."""
    request = cluster.requests[index]
    piece, plans = request["piece"], cluster.plans
    generated = request["generated_at_join"]
    evaluate(plans, piece, target_tokens(request), int(generated), 0)
    rows = cluster.rows
    amounts(plans, piece, rows, VECTOR)
    slopes(plans, piece, rows, SLOPE)
    pace(cluster.world, rows, plans.pieces[piece]["columns"], generated - int(generated))
    steps = cluster.replicas[request["replica"]]["iteration"] - request["joined"]
    for i in range(plans.pieces[piece]["columns"]):
        rows[VECTOR, i] += steps * rows[SLOPE, i]


def advance(cluster: Cluster, replica_index: int, steps: int) -> None:
    """All decoding sequences have done `steps` iterations, at most those until the next is due."""
    replica = cluster.replicas[replica_index]
    advance_tenants(cluster, replica_index, steps)
    if replica["length"][DECODING] == 0:
        return
    replica["iteration"] += steps
    sums = cluster.sums
    for structure in range(sums.shape[1]):
        if sums[replica_index, structure, 0, COUNT]:
            for i in range(sums.shape[3]):
                sums[replica_index, structure, 0, i] += steps * sums[replica_index, structure, 1, i]
    for tier in range(N_TIERS):
        replica["stored_bytes"][tier] += steps * replica["growth_bytes"][tier]


def renew(cluster: Cluster, index: int) -> bool:
    """Give a request that is due the plan of its next iterations; False when it is complete. May make a detour."""
    request = cluster.requests[index]
    replica = cluster.replicas[request["replica"]]
    generated = generated_tokens(cluster.world, request, replica["iteration"])
    if int(generated) > last_generated(request):
        return False
    find(cluster.plans, DECODE, target_tokens(request), int(generated), 0)
    _subtract(cluster, index)
    _add(cluster, index, generated)
    return True


def set_next_due(cluster: Cluster, replica: Record) -> None:
    """Note when the next decoding sequence is due."""
    nearest, index = NEVER + replica["iteration"], replica["first"][DECODING]
    while index != NOBODY:
        nearest = min(nearest, cluster.requests[index]["due"])
        index = cluster.requests[index]["after"]
    replica["next_due"] = nearest


def _add(cluster: Cluster, index: int, generated: float) -> None:
    request, plans = cluster.requests[index], cluster.plans
    replica = cluster.replicas[request["replica"]]
    fed = int(generated)
    piece = find(plans, DECODE, target_tokens(request), fed, 0)
    amounts(plans, piece, cluster.rows, VECTOR)
    slopes(plans, piece, cluster.rows, SLOPE)
    until = min(NEVER, fed + steps_until_change(plans, piece), last_generated(request) + 1)
    pace(cluster.world, cluster.rows, plans.pieces[piece]["columns"], generated - fed)
    request["piece"], request["joined"], request["generated_at_join"] = piece, replica["iteration"], generated
    request["due"] = replica["iteration"] + steps_over(cluster.world, until - generated)
    replica["next_due"] = min(replica["next_due"], request["due"])
    _count(cluster, index, 1)


def _subtract(cluster: Cluster, index: int) -> None:
    set_amounts(cluster, index)
    _count(cluster, index, -1)


def _count(cluster: Cluster, index: int, sign: int) -> None:
    """Add VECTOR and SLOPE of a request to the sums that it belongs to, or subtract them."""
    request = cluster.requests[index]
    number, piece = request["replica"], cluster.plans.pieces[request["piece"]]
    replica, structure, rows = cluster.replicas[number], piece["structure"], cluster.rows
    for i in range(piece["columns"]):
        cluster.sums[number, structure, 0, i] += sign * rows[VECTOR, i]
        cluster.sums[number, structure, 1, i] += sign * rows[SLOPE, i]
    for tier in range(N_TIERS):
        replica["stored_bytes"][tier] += sign * rows[VECTOR, STORED + tier]
        replica["growth_bytes"][tier] += sign * rows[SLOPE, STORED + tier]
    tenant = cluster.tenants[number, request["tenant"]]
    tenant["decoding"] += sign
    tenant["stored_bytes"] += sign * rows[VECTOR, STORED + HBM]
    tenant["growth_bytes"] += sign * rows[SLOPE, STORED + HBM]


def leave(cluster: Cluster, index: int, now_s: float) -> None:
    """A request is finished, rejected or has timed out."""
    request = cluster.requests[index]
    replica = cluster.replicas[request["replica"]]
    replica["left"] += 1
    replica["outstanding_tokens"] -= request["prompt_tokens"] + request["output_tokens"]
    has_left(cluster, index, now_s)
